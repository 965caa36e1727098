package debug

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

func (s *session) bundleCommand() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:   "bundle",
		Short: "Write one archive with everything a bug report needs",
		Long: "Write one archive with everything a bug report needs: status, objects, table, denials, flows,\n" +
			"leases, links, routes, settings and the findings of doctor. Values that look like secrets are\n" +
			"removed. It does hold pod names, labels and addresses: look at it before you send it. A part\n" +
			"that cannot be had is in it as the reason why.",
		Example: "  nftcni debug bundle\n  nftcni debug bundle --to /tmp/node7.tar.gz",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if to == "" {
				to = "nftcni-bundle-" + time.Now().UTC().Format("20060102-150405") + ".tar.gz"
			}
			f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return fmt.Errorf("make bundle: %w", err)
			}
			n, err := s.bundle(cmd.Context(), f)
			if err := errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("write bundle %s: %w", to, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", to, plural(n, "file"))
			return err
		},
	}
	cmd.Flags().StringVar(&to, "to", "", "file to write, which must not exist; default: nftcni-bundle-TIME.tar.gz here")
	return cmd
}

// part is one file of the bundle.
type part struct {
	name string
	get  func(context.Context) (any, error)
}

func (s *session) parts() []part {
	asked := func(name, path string, into any) part {
		return part{name, func(ctx context.Context) (any, error) { return into, s.get(ctx, path, into) }}
	}
	return []part{
		asked("status.json", agent.PathStatus, &agent.Status{}),
		asked("pods.json", agent.PathPods, &[]agent.Pod{}),
		asked("policies.json", agent.PathPolicies, &[]agent.Policy{}),
		asked("flows.json", agent.PathFlows, &agent.Flows{}),
		{"snapshot.json", func(ctx context.Context) (any, error) { return s.snapshot(ctx, func(string) {}) }},
		{"doctor.json", func(ctx context.Context) (any, error) { return s.examine(ctx, "/etc/cni/net.d"), nil }},
		{"leases.json", func(ctx context.Context) (any, error) { return s.leases(ctx) }},
		{"attachments.json", func(context.Context) (any, error) {
			list, errs := cni.Attachments(s.runDir)
			return list, errors.Join(errs...)
		}},
		{"table.json", func(ctx context.Context) (any, error) {
			return readTable(ctx, func(r *nft.Reader) (any, error) { return tableRows(ctx, r) })
		}},
		{"denials.json", func(ctx context.Context) (any, error) {
			return readTable(ctx, func(r *nft.Reader) (any, error) { return s.drops(ctx, 100, func(string) {}) })
		}},
		{"ruleset.nft", func(context.Context) (any, error) { return nft.Program(), nil }},
		{"chains.json", func(context.Context) (any, error) { return nft.BaseChains(nft.Options{}) }},
		{"links.json", func(context.Context) (any, error) { return linkRows() }},
		{"routes.json", func(context.Context) (any, error) { return routeRows() }},
		{"system.json", func(context.Context) (any, error) { return systemRow() }},
	}
}

func readTable(ctx context.Context, f func(*nft.Reader) (any, error)) (any, error) {
	r, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { _ = r.Close() }()
	return f(r)
}

func tableRows(ctx context.Context, r *nft.Reader) (any, error) {
	t, err := r.Tables(ctx)
	if err != nil {
		return nil, err
	}
	return render(&policy.Compiled{Tables: t}), nil
}

func linkRows() (any, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	out := []map[string]any{}
	for _, l := range links {
		a := l.Attrs()
		out = append(out, map[string]any{"index": a.Index, "name": a.Name, "type": l.Type(), "mtu": a.MTU, "state": a.OperState.String(), "alias": a.Alias})
	}
	return out, nil
}

func routeRows() (any, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	out := []string{}
	for _, r := range routes {
		out = append(out, r.String())
	}
	return out, err
}

func systemRow() (any, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	settings := map[string]string{}
	for _, path := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter",
		"net/netfilter/nf_conntrack_count", "net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_tcp_loose"} {
		settings[path] = sysctl(path)
	}
	return map[string]any{"kernel": unix.ByteSliceToString(u.Release[:]), "machine": unix.ByteSliceToString(u.Machine[:]),
		"go": runtime.Version(), "time": time.Now().UTC(), "sysctl": settings}, nil
}

// bundle writes the archive and returns how many files are in it.
func (s *session) bundle(ctx context.Context, to io.Writer) (int, error) {
	z := gzip.NewWriter(to)
	t := tar.NewWriter(z)
	n := 0
	for _, p := range s.parts() {
		name, data := p.name, []byte(nil)
		v, err := p.get(ctx)
		if err == nil {
			data, err = encodePart(v)
		}
		if err != nil {
			name, data = p.name+".error", []byte(err.Error()+"\n")
		}
		data = withoutSecrets(data)
		h := &tar.Header{Name: filepath.Join("nftcni-bundle", name), Mode: 0o600, Size: int64(len(data)), ModTime: time.Now()}
		if err := t.WriteHeader(h); err != nil {
			return n, err
		}
		if _, err := t.Write(data); err != nil {
			return n, err
		}
		n++
	}
	return n, errors.Join(t.Close(), z.Close())
}

func encodePart(v any) ([]byte, error) {
	if text, ok := v.(string); ok {
		return []byte(text), nil
	}
	return json.MarshalIndent(v, "", "  ")
}

// secrets match the values of labels and messages that must not leave the node: words
// for credentials followed by a value, bearer tokens, keys in PEM, WireGuard keys.
var secrets = []*regexp.Regexp{
	regexp.MustCompile(`(?i)("?[\w.\-/]*(?:password|passwd|secret|token|apikey|api-key|private-?key)[\w.\-]*"?\s*[:=]\s*"?)[^\s",}]+`),
	regexp.MustCompile(`(?i)(bearer\s+)[\w.\-+/=]{8,}`),
	regexp.MustCompile(`()-----BEGIN [A-Z ]*KEY-----[^-]*-----END [A-Z ]*KEY-----`),
	regexp.MustCompile(`(\W)[A-Za-z0-9+/]{43}=`),
}

func withoutSecrets(b []byte) []byte {
	b = slices.Clone(b)
	for _, re := range secrets {
		b = re.ReplaceAll(b, []byte("${1}REMOVED"))
	}
	return bytes.TrimSpace(append(b, '\n'))
}
