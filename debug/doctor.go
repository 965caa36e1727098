package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
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
		Long: "Check what usually goes wrong on a node, with the remedy for each: the agent, the table,\n" +
			"forwarding, reverse path filters, other firewalls, CNI configurations, MTU, conntrack, leases,\n" +
			"stale links, kernel features and kube-proxy. With --fix it does the remedies that are safe:\n" +
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
	list = append(list, checkForeignChains()...)
	list = append(list, checkConflists(confDir)...)
	list = append(list, s.checkLinks(ctx)...)
	list = append(list, checkConntrack(), s.checkLeases(ctx), checkKubeProxy(), checkClock())
	return append(list, checkFeatures(ctx)...)
}

func (s *session) checkAgent(st agent.Status, err error) Finding {
	const name = "agent"
	switch {
	case errors.Is(err, errNoAgent):
		return broken(name, "does not answer: new pods cannot start; policies in force stay in force",
			"start it (systemctl start nftcni-agent), then see journalctl -u nftcni-agent")
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

// sysctl reads a file below /proc/sys; "" when there is none.
func sysctl(path string) string {
	b, err := os.ReadFile(filepath.Join("/proc/sys", path))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func setSysctl(path, value string) func() error {
	return func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644); err != nil {
			return fmt.Errorf("set %s: %w", path, err)
		}
		return nil
	}
}

func checkForwarding() []Finding {
	var out []Finding
	for _, f := range []struct{ family, path, key string }{
		{"IPv4", "net/ipv4/ip_forward", "net.ipv4.ip_forward"},
		{"IPv6", "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"},
	} {
		name := "forwarding " + f.family
		switch v := sysctl(f.path); v {
		case "1", "2":
			out = append(out, ok(name, "on"))
		case "":
			out = append(out, warn(name, "the kernel has no "+f.family, "nothing to do unless pods shall have "+f.family))
		default:
			x := broken(name, "off: pods reach nothing beyond their node", "sysctl -w "+f.key+"=1, and write it to /etc/sysctl.d")
			x.fix = setSysctl(f.path, "1")
			out = append(out, x)
		}
	}
	return out
}

// checkReversePath: strict filtering of all interfaces drops packets whose way back is
// another interface: asymmetric routes, several uplinks (kernel, ip-sysctl.rst).
func checkReversePath() Finding {
	const name = "reverse path filter"
	all, _ := strconv.Atoi(sysctl("net/ipv4/conf/all/rp_filter"))
	if all == 1 {
		f := warn(name, "net.ipv4.conf.all.rp_filter is 1 (strict): packets over asymmetric routes are dropped without a trace",
			"sysctl -w net.ipv4.conf.all.rp_filter=2 unless the node must be strict; nftcni drops spoofed pod addresses itself")
		f.fix = setSysctl("net/ipv4/conf/all/rp_filter", "2")
		return f
	}
	return ok(name, "not strict for all interfaces (%d)", all)
}

func checkConntrack() Finding {
	const name = "conntrack"
	count, err1 := strconv.Atoi(sysctl("net/netfilter/nf_conntrack_count"))
	limit, err2 := strconv.Atoi(sysctl("net/netfilter/nf_conntrack_max"))
	switch {
	case err1 != nil || err2 != nil:
		return warn(name, "its counters cannot be read", "run as root on the node itself")
	case limit > 0 && count*100 >= limit*90:
		return broken(name, fmt.Sprintf("%d of %d entries: new connections are dropped when it is full", count, limit),
			fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d, and find who opens so many (nftcni debug flows)", limit*2))
	case limit > 0 && count*100 >= limit*70:
		return warn(name, fmt.Sprintf("%d of %d entries", count, limit), fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", limit*2))
	}
	return ok(name, "%d of %d entries", count, limit)
}

func (s *session) checkLeases(ctx context.Context) Finding {
	const name = "leases"
	rows, err := s.leases(ctx)
	if err != nil {
		return warn(name, err.Error(), "name the state directory with --state-dir")
	}
	gone := 0
	for _, r := range rows {
		if r.NetNSGone {
			gone++
		}
	}
	if gone > 0 {
		return warn(name, fmt.Sprintf("%d of %s belong to network namespaces that are gone", gone, plural(len(rows), "lease")),
			"the agent releases them within seconds when it runs; else the runtime's CNI GC does (nftcni debug ipam lists them)")
	}
	return ok(name, "%s, all of living pods", plural(len(rows), "address"))
}
