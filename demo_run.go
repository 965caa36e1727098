package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// demo is one run of the demo inside the node's namespaces.
type demo struct {
	out      io.Writer
	progress progress
	print    printer

	node     *demoNode
	expected matrix
	ends     []*endpoint // in the order of expected.names
}

// The outside host's addresses, by the name of their row.
func outsideEnds() map[string][]netip.Addr {
	return map[string][]netip.Addr{
		"172.17.0.10": {netip.MustParseAddr("172.17.0.10")},
		"172.17.1.10": {netip.MustParseAddr("172.17.1.10")},
		"10.0.0.10":   {netip.MustParseAddr("10.0.0.10")},
		"world":       {netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("2001:db8:ffff::10")},
	}
}

func newDemo(out, errOut io.Writer) *demo {
	colour := isTerminal(out) && os.Getenv("NO_COLOR") == ""
	return &demo{out: out, progress: newProgress(errOut), print: printer{out, colour}}
}

func (d *demo) run(ctx context.Context) (err error) {
	start := time.Now()
	if err := privateRun(); err != nil {
		return explainRestricted(err)
	}
	text, err := demoFiles.ReadFile("testdata/demo/expected.txt")
	if err != nil {
		return err
	}
	if d.expected, err = parseMatrix(text); err != nil {
		return fmt.Errorf("expected.txt: %w", err)
	}
	d.progress.step("making a node and an outside host in network namespaces")
	if d.node, err = newDemoNode("demo", outsideEnds()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.node.close()) }()
	if err := copyFiles(d.node.manifests, "testdata/demo/manifests"); err != nil {
		return err
	}
	d.progress.step("starting nftcni agent --manifests %s", d.node.manifests)
	if err := d.node.startAgent(ctx); err != nil {
		return err
	}
	if err := d.attach(ctx); err != nil {
		return err
	}
	differ, err := d.showMatrix(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{"1-policy", "2-label"} {
		n, err := d.showChange(ctx, name)
		if err != nil {
			return err
		}
		differ += n
	}
	if err := d.detach(ctx); err != nil {
		return err
	}
	if differ > 0 {
		return fmt.Errorf("%d cells differ from what the policies mean", differ)
	}
	fmt.Fprintf(d.out, "\nAll as expected, in %.1f s. Nothing is left behind.\n", time.Since(start).Seconds())
	return nil
}

// attach adds every pod through the plugin and makes the endpoints of the matrix.
func (d *demo) attach(ctx context.Context) error {
	var pods int
	var took time.Duration
	for _, name := range d.expected.names {
		if namespace, pod, isPod := strings.Cut(name, "/"); isPod {
			d.progress.step("attaching pods through libcni: %s", name)
			begin := time.Now()
			e, err := d.node.attach(ctx, d.node.network, namespace, pod)
			if err != nil {
				return err
			}
			pods, took = pods+1, took+time.Since(begin)
			d.ends = append(d.ends, e)
			continue
		}
		e, ok := d.node.ends[name]
		if !ok {
			return fmt.Errorf("expected.txt names %q, which is neither a pod nor an address of the node or the outside host", name)
		}
		d.ends = append(d.ends, e)
	}
	for _, e := range d.ends {
		if err := serve(ctx, e, d.expected.services()); err != nil {
			return err
		}
	}
	d.progress.clear()
	fmt.Fprintf(d.out, "%d pods attached through CNI ADD, %.1f ms each, their policies in force when ADD returned.\n",
		pods, float64(took.Microseconds())/1000/float64(pods))
	return nil
}

// ask sends the probes of the matrix.
func (d *demo) ask(ctx context.Context) ([]*probe, time.Duration, error) {
	probes := d.expected.probes(d.ends)
	d.progress.step("asking %d times with real packets", len(probes))
	begin := time.Now()
	err := askAll(ctx, probes, d.expected.expects)
	d.progress.clear()
	return probes, time.Since(begin), err
}

func (d *demo) showMatrix(ctx context.Context) (differ int, err error) {
	probes, took, err := d.ask(ctx)
	if err != nil {
		return 0, err
	}
	differ = d.print.beside(d.expected, d.expected.seen(probes))
	allowed := 0
	for _, p := range probes {
		if p.answered {
			allowed++
		}
	}
	fmt.Fprintf(d.out, "\n%d probes in %.1f s: %d allowed, %d denied; %d cells differ.\n",
		len(probes), took.Seconds(), allowed, len(probes)-allowed, differ)
	d.reportDifferences(probes)
	return differ, nil
}

func (d *demo) reportDifferences(probes []*probe) {
	const most = 20
	n := 0
	for _, p := range probes {
		if p.answered == d.expected.expects(p) {
			continue
		}
		if n++; n <= most {
			fmt.Fprintf(d.out, "  %s: %s, expected %s\n", p, verdict(p.answered), verdict(!p.answered))
		}
	}
	if n > most {
		fmt.Fprintf(d.out, "  and %d more\n", n-most)
	}
}

func verdict(allowed bool) string {
	if allowed {
		return "allowed"
	}
	return "denied"
}

// showChange overlays the manifests with one change, and shows which cells changed.
func (d *demo) showChange(ctx context.Context, name string) (differ int, err error) {
	dir := path.Join("testdata/demo/changes", name)
	text, err := demoFiles.ReadFile(path.Join(dir, "expected.txt"))
	if err != nil {
		return 0, err
	}
	title, changed, err := d.expected.change(text)
	if err != nil {
		return 0, fmt.Errorf("%s/expected.txt: %w", name, err)
	}
	took, err := d.node.change(ctx, func() error { return copyFiles(d.node.manifests, dir) })
	if err != nil {
		return 0, err
	}
	before := d.expected
	d.expected = changed
	probes, _, err := d.ask(ctx)
	if err != nil {
		return 0, err
	}
	fmt.Fprintf(d.out, "\n%s\n  in force %d microseconds after the agent read it.\n", d.print.paint(bold, "Change: "+title), took.Microseconds())
	seen := changed.seen(probes)
	for k, b := range changed.blocks {
		for i, src := range changed.names {
			for j, dst := range changed.names {
				old, want, got := before.blocks[k].cells[i][j], b.cells[i][j], seen.blocks[k].cells[i][j]
				if old == want && want == got {
					continue
				}
				fmt.Fprintf(d.out, "  %s -> %s  %s: was %c, expected %c, seen %s\n", src, dst, b.heading(), old, want, d.print.cell(got, want))
				if got != want {
					differ++
				}
			}
		}
	}
	fmt.Fprintf(d.out, "  %d probes; every other cell is as before; %d cells differ.\n", len(probes), differ)
	d.reportDifferences(probes)
	return differ, nil
}

func (d *demo) detach(ctx context.Context) error {
	d.progress.step("detaching the pods")
	defer d.progress.clear()
	if err := d.node.detachAll(ctx); err != nil {
		return err
	}
	return d.node.checkEmpty()
}

// change applies lines "SRC -> DST SERVICE opens|closes" to a copy of m. The title is
// the text of the comments.
func (m matrix) change(text []byte) (title string, changed matrix, err error) {
	changed = m.clone()
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if comment, ok := strings.CutPrefix(line, "#"); ok {
			title = strings.TrimSpace(title + " " + strings.TrimSpace(comment))
			continue
		}
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) != 5 || f[1] != "->" || f[4] != "opens" && f[4] != "closes" {
			return "", m, fmt.Errorf("line %q: want SRC -> DST SERVICE opens or closes", line)
		}
		if err := changed.set(f[0], f[2], f[3], f[4] == "opens"); err != nil {
			return "", m, fmt.Errorf("line %q: %w", line, err)
		}
	}
	return title, changed, nil
}

func (m matrix) set(src, dst, name string, allowed bool) error {
	i, j := slices.Index(m.names, src), slices.Index(m.names, dst)
	if i < 0 || j < 0 {
		return fmt.Errorf("no row is named %s or %s", src, dst)
	}
	for _, b := range m.blocks {
		if b.heading() != name {
			continue
		}
		b.cells[i][j] = cellDenied
		if allowed {
			b.cells[i][j] = cellAllowed
		}
		return nil
	}
	return fmt.Errorf("no block is headed %s", name)
}

// copyFiles copies the YAML files of an embedded folder, each by renaming, so that the agent
// never sees half a file.
func copyFiles(to, from string) error {
	entries, err := fs.Glob(demoFiles, path.Join(from, "*.yaml"))
	if err != nil {
		return err
	}
	for _, name := range entries {
		data, err := demoFiles.ReadFile(name)
		if err != nil {
			return err
		}
		if err := writeRenamed(filepath.Join(to, path.Base(name)), data); err != nil {
			return err
		}
	}
	return nil
}

func writeRenamed(name string, data []byte) error {
	part := filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".part")
	if err := os.WriteFile(part, data, 0o644); err != nil {
		return err
	}
	return os.Rename(part, name)
}
