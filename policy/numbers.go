package policy

// numbers hands out numbers of one range, monotonic until the range is exhausted.
type numbers struct {
	first, last, cur uint32
	clear            uint32 // bits that stay zero
	used             map[uint32]struct{}
}

func (n *numbers) next() uint32 {
	for {
		n.cur = max(n.cur+1, n.first)
		if n.cur&n.clear != 0 {
			n.cur = (n.cur | 0xffff) + 1
		}
		if n.cur > n.last {
			n.cur = n.first
		}
		if _, taken := n.used[n.cur]; !taken {
			n.used[n.cur] = struct{}{}
			return n.cur
		}
	}
}

func (n *numbers) free(v uint32) { delete(n.used, v) }

// avoid makes n hand out none of the numbers listed, and greater ones at first, so that
// what the kernel still has to forget is not soon in its way.
func (n *numbers) avoid(list func(yield func(uint32))) {
	*n = numbers{first: n.first, last: n.last, clear: n.clear, used: map[uint32]struct{}{}}
	list(func(v uint32) {
		n.used[v] = struct{}{}
		n.cur = max(n.cur, v)
	})
}

// keep frees all numbers but those listed.
func (n *numbers) keep(list func(yield func(uint32))) {
	n.used = map[uint32]struct{}{}
	list(func(v uint32) { n.used[v] = struct{}{} })
}

func (n *numbers) valid(v uint32) bool { return n.first <= v && v <= n.last && v&n.clear == 0 }

func (e *Engine) profileNumbers(d Direction) *numbers {
	if d == Egress {
		return &e.egressNumbers
	}
	return &e.ingressNumbers
}
