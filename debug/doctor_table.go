package debug

import (
	"context"
	"errors"

	"github.com/nftcni/nftcni/nft"
)

// checkTable looks at our own table.
func checkTable(ctx context.Context, agentRuns bool) []Finding {
	const name = "table"
	r, err := nft.NewReader(ctx, nft.Options{})
	if errors.Is(err, nft.ErrNoTable) {
		remedy := "start the agent: it makes the table"
		if agentRuns {
			remedy = "somebody deleted it and the agent has not mended it: see its log, then restart it"
		}
		return []Finding{broken(name, "inet nftcni is missing: no policy is in force", remedy)}
	}
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	defer func() { _ = r.Close() }()
	if f, differs := checkRules(ctx, r, agentRuns); differs {
		return []Finding{f}
	}
	sizes, err := r.Sizes(ctx)
	if err != nil {
		return []Finding{broken(name, err.Error(), "restart the agent: it replaces the table without a gap")}
	}
	total := 0
	for _, n := range sizes {
		total += n
	}
	return []Finding{ok(name, "inet nftcni, %s", plural(total, "element"))}
}

// checkRules compares the table's chains and rules with this version's. With an agent, which
// owns the table, another version's agent is the likely reason.
func checkRules(ctx context.Context, r *nft.Reader, agentRuns bool) (Finding, bool) {
	const name = "table"
	difference, err := r.Differs(ctx)
	switch {
	case err != nil:
		return broken(name, err.Error(), "restart the agent: it replaces the table without a gap"), true
	case difference == "":
		return Finding{}, false
	case agentRuns:
		return warn(name, "inet nftcni is not this version's: "+difference,
			"restart the agent: it replaces the table without a gap; this program may be newer than the agent"), true
	}
	return broken(name, "inet nftcni was changed: "+difference+"; policy is not enforced as written", "start the agent: it replaces the table without a gap"), true
}
