package policy

// Adopt tells the engine what the kernel holds from a predecessor. It must come before
// the first Replace, which then keeps every number whose content is still right.
func (e *Engine) Adopt(kernel Tables) { e.adopted = kernel }
