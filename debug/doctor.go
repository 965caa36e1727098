package debug

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/nft"
)

// Health is how a check ended.
type Health string

// The three ends of a check.
const (
	Healthy Health = "ok"
	Suspect Health = "warning" // it may be meant so, or could not be told
	Broken  Health = "broken"  // pods or policies do not work because of it
)

// Finding is the result of one check of debug doctor.
type Finding struct {
	Check  string `json:"check"`
	Health Health `json:"health"`
	Found  string `json:"found"`
	Remedy string `json:"remedy,omitempty"`
	Fixed  bool   `json:"fixed,omitempty"`

	fix func() error // nil: a person must decide
}

func ok(check, format string, args ...any) Finding {
	return Finding{Check: check, Health: Healthy, Found: fmt.Sprintf(format, args...)}
}

func warn(check, found, remedy string) Finding {
	return Finding{Check: check, Health: Suspect, Found: found, Remedy: remedy}
}

func broken(check, found, remedy string) Finding {
	return Finding{Check: check, Health: Broken, Found: found, Remedy: remedy}
}

func (s *session) doctorCommand() *cobra.Command {
	var fix bool
	var confDir string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check what usually goes wrong on a node, with the remedy for each",
		Long: "Check what usually goes wrong on a node, with the remedy for each: the agent, the table and its\n" +
			"rules, forwarding, reverse path filters, other firewalls, CNI configurations, stale links, MTU,\n" +
			"paths to other nodes, conntrack, leases, kube-proxy, the clock and kernel features. With --fix it does the remedies that are safe:\n" +
			"those that change a setting nothing else can want otherwise on a node with pods.\n\n" +
			"Exit status 1: something is broken.",
		Example: "  nftcni debug doctor\n  nftcni debug doctor --fix\n  nftcni debug doctor -o json | jq '.[] | select(.health != \"ok\")'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list := s.examine(cmd.Context(), confDir)
			if fix {
				fixAll(list)
			}
			if err := s.print(cmd, list, func(w io.Writer) error { return writeFindings(w, list) }); err != nil {
				return err
			}
			return countBroken(list)
		},
	}
	cmd.Flags().BoolVar(&fix, "fix", false, "do the safe remedies")
	cmd.Flags().StringVar(&confDir, "cni-conf-dir", "/etc/cni/net.d", "where the runtime looks for network configurations")
	return cmd
}

func fixAll(list []Finding) {
	for i := range list {
		f := &list[i]
		if f.fix == nil || f.Health == Healthy {
			continue
		}
		if err := f.fix(); err != nil {
			f.Remedy += " (tried: " + err.Error() + ")"
			continue
		}
		f.Fixed, f.Health = true, Healthy
	}
}

func countBroken(list []Finding) error {
	n := 0
	for _, f := range list {
		if f.Health == Broken {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return fmt.Errorf("%s failed: the remedies are above", plural(n, "check"))
}

func writeFindings(w io.Writer, list []Finding) error {
	t := &table{header: []string{"CHECK", "HEALTH", "FOUND"}}
	for _, f := range list {
		health := string(f.Health)
		if f.Fixed {
			health = "fixed"
		}
		t.add(f.Check, health, f.Found)
		if f.Remedy != "" && !f.Fixed {
			text := f.Remedy
			if f.fix != nil {
				text += " (--fix does it)"
			}
			t.add("", "", "  remedy: "+text)
		}
	}
	return t.write(w)
}

// examine runs every check. One that cannot be made is a warning, never a reason to
// stop: a doctor is called when things are broken.
func (s *session) examine(ctx context.Context, confDir string) []Finding {
	var status agent.Status
	agentErr := s.get(ctx, agent.PathStatus, &status)
	list := []Finding{s.checkAgent(status, agentErr)}
	list = append(list, checkTable(ctx, agentErr == nil)...)
	list = append(list, checkForwarding()...)
	list = append(list, checkReversePath())
	list = append(list, checkForeignChains(ctx)...)
	list = append(list, checkConflists(confDir)...)
	list = append(append(list, s.checkLinks(ctx)...), s.checkMesh(ctx)...)
	list = append(append(list, checkConntrack()), s.checkLeases(ctx)...)
	list = append(list, checkKubeProxy(ctx), checkClock())
	return append(list, featureFindings(nft.Features(ctx))...)
}

func (s *session) checkAgent(st agent.Status, err error) Finding {
	const name = "agent"
	switch {
	case errors.Is(err, errNoAgent):
		return broken(name, "does not answer: no pod can start, no change of policy arrives",
			"start it (systemctl start nftcni-agent, or delete its pod of the DaemonSet), then see its log (journalctl -u nftcni-agent, kubectl logs)")
	case err != nil:
		return broken(name, err.Error(), "run as root")
	case !st.Ready:
		return broken(name, "not ready: "+st.Reason, "see its log; with an API server, check that it answers")
	case len(st.Problems) > 0:
		return warn(name, fmt.Sprintf("ready; %s not in force as written, the first: %s", plural(len(st.Problems), "object"), st.Problems[0]),
			"mend the objects (nftcni debug status lists all)")
	}
	return ok(name, "ready, generation %d", st.Generation)
}
