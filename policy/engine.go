package policy

// Engine compiles a cluster for one node and follows its events. Its tables always
// equal compiling from scratch, up to renaming numbers and, until Tidy, up to elements
// that nothing needs any more. It is not safe for concurrent use.
type Engine struct{ node string }

// NewEngine returns the engine of node with an empty cluster.
func NewEngine(node string) *Engine { return &Engine{node: node} }

// Adopt tells the engine what the kernel holds from a predecessor. It must come before
// the first Replace, which then keeps every number whose content is still right.
func (e *Engine) Adopt(kernel Tables) {}

// Replace makes c the cluster (the first one, or a resync) and returns the change.
func (e *Engine) Replace(c *Cluster) Delta { return Delta{} }

// Apply follows events, in order, and returns one delta for all of them. Events that
// change nothing, repeat or delete what is unknown are harmless.
func (e *Engine) Apply(events ...Event) Delta { return Delta{} }

// Tidy returns the delta that removes what past deltas left behind because removing it
// would not have been exact while packets were in flight: identities that no rule tells
// apart any more are merged and elements no rule needs are deleted. Call it when idle.
func (e *Engine) Tidy() Delta { return Delta{} }

// Tables is the content that the kernel holds once all deltas and their Drops were applied.
func (e *Engine) Tables() Tables { return nil }

// Cluster returns a sorted snapshot of what the engine knows, for the oracle.
func (e *Engine) Cluster() *Cluster { return &Cluster{} }

// Compiled returns the tables with names for people.
func (e *Engine) Compiled() *Compiled { return &Compiled{} }

// Compiled is the tables of one node with the names of their numbers.
type Compiled struct {
	Tables     Tables
	Comments   map[Key]string
	Profiles   map[uint32]ProfileInfo
	Identities map[uint32]string // what tells the members apart from other addresses
	Classes    map[uint32]string // "allow tcp 80, udp 53; deny the rest"
}

// ProfileInfo describes one profile number.
type ProfileInfo struct {
	Direction Direction
	Policies  []PolicyID // in the order of the walk
	Pods      []Name     // the local pods that have it
}

// Compile compiles c for node from scratch. It is deterministic and independent of the
// order in which c lists its objects.
func Compile(c *Cluster, node string) *Compiled {
	e := NewEngine(node)
	e.Replace(c)
	return e.Compiled()
}
