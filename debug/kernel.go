package debug

import (
	"context"
	"errors"
	"fmt"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// kernel decides flows by the kernel's tables, or says why it cannot.
type kernel struct {
	decide func(context.Context, policy.Flow) (policy.TableVerdict, error)
	note   string
	open   bool // there is no table: everything passes
	// differs: the rules are not this version's, so that decide is not the kernel's answer.
	differs bool
}

// askKernel opens the table; done closes it.
func askKernel(ctx context.Context) (k kernel, done func()) {
	reader, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return kernel{note: err.Error(), open: errors.Is(err, nft.ErrNoTable)}, func() {}
	}
	k.decide = reader.Decide
	if difference, err := reader.Differs(ctx); err != nil {
		k.note = err.Error()
	} else if difference != "" {
		k.note, k.differs = rulesDiffer(difference), true
	}
	return k, func() { _ = reader.Close() }
}

// compare sets the kernel's answer beside the oracle's. What the ruleset exempts before
// it looks at policy (the pod itself, its own node) has no answer in the tables.
func (s *Side) compare(k policy.TableDecision) {
	s.Kernel = kernelSide(k)
	switch reason := s.oracle.Reason; {
	case s.Node != "" || reason == policy.NotLocal:
		s.Agree = !k.Judged
	case reason == policy.SamePod || reason == policy.OwnNode:
		s.Kernel.Exempt = true
	default:
		s.Agree = k.Allowed == (s.oracle.Action == policy.Allow)
	}
}

func kernelSide(k policy.TableDecision) *KernelSide {
	out := &KernelSide{Judged: k.Judged, Allowed: k.Allowed, decidedBy: "a miss"}
	for name, v := range map[*string]uint32{&out.Profile: k.Profile, &out.Identity: k.Identity, &out.Class: k.Class} {
		if v != 0 {
			*name = fmt.Sprintf("%#x", v)
		}
	}
	for i, l := range k.Lookups {
		value := "none"
		if l.Found {
			value = valueText(l.Key.Map, l.Value)
			if i == len(k.Lookups)-1 {
				out.decidedBy = nft.ElementSet(l.Key)
			}
		}
		out.Lookups = append(out.Lookups, nft.ElementSet(l.Key)+" "+lookupText(l.Key)+": "+value)
	}
	return out
}

// lookupText is elementText of a question: a range's key holds only what is looked for.
func lookupText(k policy.Key) string {
	if k.Map == policy.NetID {
		return k.Addr.String()
	}
	return elementText(k)
}
