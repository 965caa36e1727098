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
	"sync"
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
	quiet := func(string) {}
	return []part{
		{"status.json", func(ctx context.Context) (any, error) { return s.status(ctx, quiet) }},
		{"pods.json", func(ctx context.Context) (any, error) {
			list, err := s.pods(ctx, false, quiet)
			return podRows(list, false), err
		}},
		{"flows.json", func(ctx context.Context) (any, error) { return s.seen(ctx, "", quiet) }},
		{"snapshot.json", func(context.Context) (any, error) { return s.shared.raw() }},
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
			return readTable(ctx, func(r *nft.Reader) (any, error) { return denialRows(ctx, r) })
		}},
		{"ruleset.nft", func(context.Context) (any, error) { return nft.Program(), nil }},
		{"chains.json", func(context.Context) (any, error) { return nft.BaseChains(nft.Options{}) }},
		{"links.json", func(context.Context) (any, error) { return linkRows() }},
		{"routes.json", func(context.Context) (any, error) { return routeRows() }},
		{"system.json", func(context.Context) (any, error) { return systemRow() }},
	}
}

// sharedSnapshot is one reading of the cluster for the parts of a bundle: at 10,000 pods
// each costs the agent and this program a twentieth of a second.
type sharedSnapshot struct {
	raw    func() (json.RawMessage, error)
	parsed func() (agent.Snapshot, error)
}

func (s *session) share(ctx context.Context) *sharedSnapshot {
	raw := sync.OnceValues(func() (json.RawMessage, error) { return s.rawSnapshot(ctx) })
	return &sharedSnapshot{raw, sync.OnceValues(func() (agent.Snapshot, error) {
		var snap agent.Snapshot
		b, err := raw()
		if err == nil {
			err = json.Unmarshal(b, &snap)
		}
		if err == nil && snap.Cluster == nil {
			err = errors.New("the snapshot holds no cluster")
		}
		return snap, err
	})}
}

// rawSnapshot is the snapshot as the agent says it, or the bytes of its file.
func (s *session) rawSnapshot(ctx context.Context) (json.RawMessage, error) {
	var raw json.RawMessage
	err := s.get(ctx, agent.PathSnapshot, &raw)
	if !errors.Is(err, errNoAgent) {
		return raw, err
	}
	raw, fileErr := os.ReadFile(filepath.Join(s.runDir, agent.SnapshotName))
	if fileErr != nil {
		return nil, errors.Join(err, fileErr)
	}
	return raw, nil
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

// denialRows name no pods: snapshot.json says whose the addresses are, and to decode that
// here costs as much as the rest of a bundle.
func denialRows(ctx context.Context, r *nft.Reader) (any, error) {
	list, err := r.Denials(ctx)
	out := []Drop{}
	for _, d := range list {
		out = append(out, Drop{Direction: d.Direction().String(), Src: d.Src.String(), Dst: d.Dst.String(),
			SrcAddr: d.Src, DstAddr: d.Dst, Packets: d.Packets, Bytes: d.Bytes})
	}
	return out, err
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
	z, err := gzip.NewWriterLevel(to, gzip.BestSpeed)
	if err != nil {
		return 0, err
	}
	t := tar.NewWriter(z)
	files := s.files(ctx)
	for _, f := range files {
		h := &tar.Header{Name: filepath.Join("nftcni-bundle", f.name), Mode: 0o600, Size: int64(len(f.data)), ModTime: time.Now()}
		if err := t.WriteHeader(h); err != nil {
			return 0, err
		}
		if _, err := t.Write(f.data); err != nil {
			return 0, err
		}
	}
	return len(files), errors.Join(t.Close(), z.Close())
}

// file is a part as it is written.
type file struct {
	name string
	data []byte
}

// files gets all parts at the same time: most of them wait for the agent.
func (s *session) files(ctx context.Context) []file {
	with := *s
	with.shared = s.share(ctx)
	parts := with.parts()
	out := make([]file, len(parts))
	var wg sync.WaitGroup
	for i, p := range parts {
		wg.Go(func() {
			name, data := p.name, []byte(nil)
			v, err := p.get(ctx)
			if err == nil {
				data, err = encodePart(v)
			}
			if err != nil {
				name, data = p.name+".error", []byte(err.Error()+"\n")
			}
			out[i] = file{name, withoutSecrets(data)}
		})
	}
	wg.Wait()
	return out
}

func encodePart(v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return []byte(v), nil
	case json.RawMessage:
		return v, nil
	}
	return json.MarshalIndent(v, "", "  ")
}

// secrets match the values of labels and messages that must not leave the node: words
// for credentials followed by a value, bearer tokens, keys in PEM, WireGuard keys.
// Each has the lower-case words of which one is in everything it matches: they are
// looked for first, because the expressions take a second for 10,000 pods.
var secrets = []struct {
	words []string
	*regexp.Regexp
}{
	{[]string{"password", "passwd", "secret", "token", "apikey", "api-key", "privatekey", "private-key"},
		regexp.MustCompile(`(?i)("?[\w.\-/]*(?:password|passwd|secret|token|apikey|api-key|private-?key)[\w.\-]*"?\s*[:=]\s*"?)[^\s",}]+`)},
	{[]string{"key-data", "certificate-data"}, regexp.MustCompile(`(?i)("?[\w\-]*(?:key|certificate)-data"?\s*[:=]\s*"?)[^\s",}]+`)}, // a kubeconfig's
	{[]string{"eyj"}, regexp.MustCompile(`()\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]+`)},                                                     // JSON web tokens (RFC 7519)
	{[]string{"bearer"}, regexp.MustCompile(`(?i)(bearer\s+)[\w.\-+/=]{8,}`)},
	{[]string{"-----begin"}, regexp.MustCompile(`()-----BEGIN [A-Z ]*KEY-----[^-]*-----END [A-Z ]*KEY-----`)},
	{[]string{"="}, regexp.MustCompile(`(\W)[A-Za-z0-9+/]{43}=`)},
}

func withoutSecrets(b []byte) []byte {
	lower := bytes.ToLower(b)
	for _, secret := range secrets {
		if slices.ContainsFunc(secret.words, func(w string) bool { return bytes.Contains(lower, []byte(w)) }) {
			b = secret.ReplaceAll(b, []byte("${1}REMOVED"))
		}
	}
	return bytes.TrimSpace(b)
}
