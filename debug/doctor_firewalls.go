package debug

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
)

// checkForeignChains names what else may drop a pod's packets.
func checkForeignChains(ctx context.Context) []Finding {
	const name = "other firewalls"
	seen := map[string]bool{}
	out := foreignChains(ctx, name, unix.NFPROTO_INET, seen)
	if len(out) == 0 {
		out = append(out, ok(name, "none drops what pods send or get (tables: %s)", orDash(strings.Join(sortedKeys(seen), ", "))))
	}
	return out
}

// foreignChains are the findings about chains of one family, or of both with NFPROTO_INET;
// seen gets the tables there are.
func foreignChains(ctx context.Context, name string, family uint8, seen map[string]bool) []Finding {
	chains, err := nft.ForwardChains(ctx, nft.Options{})
	if err != nil {
		return []Finding{warn(name, err.Error(), "run as root on the node itself")}
	}
	var out []Finding
	for _, c := range chains {
		if family == unix.NFPROTO_INET || c.Family == unix.NFPROTO_INET || c.Family == family {
			seen[nft.FamilyName(c.Family)+" "+c.Table] = true
			out = append(out, foreignChain(name, c)...)
		}
	}
	legacy, err := legacyForwards()
	if err != nil {
		out = append(out, warn(name, err.Error(), "run as root on the node itself"))
	}
	for _, c := range legacy {
		if family == unix.NFPROTO_INET || c.family == family {
			seen[c.program] = true
			out = append(out, legacyChain(name, c)...)
		}
	}
	return out
}

// obstacles are what keeps an allowed packet of one family from arriving all the same.
func obstacles(ctx context.Context, six bool) []string {
	family, forwarding := uint8(unix.NFPROTO_IPV4), 0
	if six {
		family, forwarding = unix.NFPROTO_IPV6, 1
	}
	var out []string
	for _, f := range append(foreignChains(ctx, "other firewalls", family, map[string]bool{}), checkForwarding()[forwarding]) {
		if f.Health != Healthy {
			out = append(out, f.Check+": "+f.Found+" (nftcni debug doctor has the remedy)")
		}
	}
	return out
}

// foreignChain tells of a chain's policy, its rules that drop everything, and those that
// have dropped something.
func foreignChain(name string, c nft.ForwardChain) []Finding {
	var out []Finding
	where := nft.FamilyName(c.Family) + " " + c.Table
	remedy := acceptRemedy(c.BaseChain)
	tell := func(what string, packets uint64) {
		text := where + " " + what
		if packets > 0 {
			text += fmt.Sprintf(" (%d so far)", packets)
		}
		if c.Accepts {
			out = append(out, warn(name, text+" that no rule before accepts; an accept of ours does not spare them", remedy+"; nftcni debug trace shows whether it drops pods' packets"))
			return
		}
		out = append(out, broken(name, text+" and nothing in it accepts any", remedy))
	}
	rules := 0
	for _, r := range c.Blocks {
		place := fmt.Sprintf("chain %s rule %d (handle %d%s) %ss", r.Chain, r.Index, r.Handle, commentText(r.Comment), r.Verdict)
		switch {
		case !r.Conditional && c.Hook == unix.NF_INET_FORWARD:
			tell(place+" all forwarded packets", r.Packets)
		case r.Conditional && r.Packets > 0 && rules < 3: // the first tell enough
			rules++
			out = append(out, warn(name, fmt.Sprintf("%s %s some packets (%d so far)", where, place, r.Packets),
				"nftcni debug trace shows whether they are pods'; then "+remedy))
		}
	}
	if c.Drops && !c.SparesPods && c.Hook == unix.NF_INET_FORWARD {
		tell("chain "+c.Name+" has policy drop for forwarded packets", c.Packets)
	}
	return out
}

func commentText(comment string) string {
	if comment == "" {
		return ""
	}
	return fmt.Sprintf(", %q", comment)
}

// acceptRemedy is how the owner of a table is told to spare pods.
func acceptRemedy(c nft.BaseChain) string {
	program := map[uint8]string{unix.NFPROTO_IPV4: "iptables", unix.NFPROTO_IPV6: "ip6tables"}[c.Family]
	switch {
	case c.Table == "firewalld":
		return "firewall-cmd --permanent --zone=trusted --add-interface=nft+ && firewall-cmd --reload"
	case program != "" && slices.Contains([]string{"filter", "raw", "mangle"}, c.Table):
		return iptablesRemedy(program)
	}
	table := nft.FamilyName(c.Family) + " " + c.Table + " " + c.Name
	return fmt.Sprintf("have it accept pods: nft insert rule %s iifname '\"nft*\"' accept; nft insert rule %s oifname '\"nft*\"' accept", table, table)
}

func iptablesRemedy(program string) string {
	return fmt.Sprintf("%s -I FORWARD -i nft+ -j ACCEPT; %s -I FORWARD -o nft+ -j ACCEPT (with Docker: into DOCKER-USER, or \"ip-forward-no-drop\": true in daemon.json)", program, program)
}

func legacyChain(name string, c legacyForward) []Finding {
	if c.spares || !c.drops && len(c.blocks) == 0 {
		return nil
	}
	text := c.program + " filter FORWARD"
	if c.drops {
		text += " has policy DROP for forwarded packets"
	}
	if len(c.blocks) > 0 {
		text += ", and drops in " + strings.Join(c.blocks, ", ")
	}
	return []Finding{warn(name, text+"; an accept of ours does not spare them", iptablesRemedy(c.program)+"; nftcni debug trace cannot see this program's rules")}
}
