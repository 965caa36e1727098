package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Options of Install.
type Options struct {
	Layout
	Executable io.Reader // what to install as Layout.Binary
	// Agent is the agent's command line behind "agent" in the unit, such as
	// --kubeconfig /etc/nftcni/kubeconfig.
	Agent []string
	// Prefix of the network configuration that the agent will write; see WriteConflist.
	Prefix string
	// FilesOnly installs the binary and its links and nothing else: what a DaemonSet needs.
	FilesOnly bool
	// PolicyOnly enforces beside another CNI plugin, which keeps wiring pods: its network
	// configuration stays, and the agent writes none.
	PolicyOnly bool
	// KeepOthers leaves the network configurations of other CNI plugins where they are.
	KeepOthers bool
}

// Step is one thing that Install or Uninstall did, for people.
type Step struct {
	Did  string // "wrote", "kept", "linked", "moved aside", "removed", "put back"
	Path string
	Note string
}

func (s Step) String() string {
	if s.Note == "" {
		return fmt.Sprintf("%-12s %s", s.Did, s.Path)
	}
	return fmt.Sprintf("%-12s %s (%s)", s.Did, s.Path, s.Note)
}

// installer collects steps until the first error; what was done before it stays, and
// running it again continues.
type installer struct {
	Layout
	steps []Step
	err   error
}

// Install puts nftcni on the node and returns what it did, also with an error. Running it
// again upgrades: the binary is replaced in one step, settings that exist are kept. The network
// configurations of others are moved aside last, when everything else stands.
func Install(o Options) ([]Step, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Prefix != "" && !prefixForm.MatchString(o.Prefix) {
		return nil, fmt.Errorf("--cni-conf-prefix is %q: it takes two digits and a dash, such as 00- or 10-", o.Prefix)
	}
	if err := o.sweep(); err != nil {
		return nil, err
	}
	in := &installer{Layout: o.Layout}
	in.binary(o.Executable)
	if o.FilesOnly {
		in.link(filepath.Join(o.BinDir, "nftcni-ipam"))
		return in.steps, in.err
	}
	for _, path := range sortedKeys(o.links()) {
		in.link(path)
	}
	in.settings(o)
	for _, name := range sortedKeys(o.dropIns()) {
		in.write(o.dropIns()[name], embedded(name), 0o644)
	}
	in.write(o.unit(), o.unitContent(), 0o644)
	in.linkTo(o.enabled(), "../nftcni-agent.service")
	if !o.KeepOthers && !o.PolicyOnly {
		in.takeOver()
	}
	return in.steps, in.err
}

func (in *installer) did(did, path, note string) { in.steps = append(in.steps, Step{did, path, note}) }

func (in *installer) binary(r io.Reader) {
	if in.err = replaceFile(in.in(in.Binary()), r, 0o755); in.err == nil {
		in.did("wrote", in.Binary(), "")
	}
}

func (in *installer) write(path string, content []byte, mode fs.FileMode) {
	if in.err != nil {
		return
	}
	changed, err := writeFile(in.in(path), content, mode)
	switch {
	case err != nil:
		in.err = err
	case changed:
		in.did("wrote", path, "")
	default:
		in.did("kept", path, "as it should be")
	}
}

// writeNew leaves a file that exists as it is: it is the administrator's.
func (in *installer) writeNew(path string, content []byte) {
	if in.err != nil {
		return
	}
	if _, err := os.Lstat(in.in(path)); err == nil {
		in.did("kept", path, "settings are yours")
		return
	}
	in.write(path, content, 0o644)
}

func (in *installer) link(path string) { in.linkTo(path, in.links()[path]) }

func (in *installer) linkTo(path, target string) {
	if in.err != nil {
		return
	}
	changed, err := replaceLink(in.in(path), target)
	switch {
	case err != nil:
		in.err = err
	case changed:
		in.did("linked", path, "to "+target)
	}
}

// settings writes the configuration files, and the layout for uninstall.
func (in *installer) settings(o Options) {
	config := embedded("agent.yaml")
	if o.PolicyOnly {
		config = bytes.Replace(config, []byte("# network: routed"), []byte("network: none"), 1)
	}
	in.writeNew(o.Config(), config)
	in.writeNew(o.Conflist(), DefaultConflist())
	layout, err := json.MarshalIndent(o.Layout, "", "  ")
	if err != nil && in.err == nil {
		in.err = fmt.Errorf("encode layout: %w", err)
	}
	in.write(o.record(), append(layout, '\n'), 0o644)
}

func (o Options) unitContent() []byte {
	args := append([]string{o.Binary(), "agent", "--config", o.Config()}, o.Agent...)
	if !o.PolicyOnly {
		args = append(args, "--cni-conf-dir", o.ConfDir, "--conflist", o.Conflist())
		if o.Prefix != "" {
			args = append(args, "--cni-conf-prefix", o.Prefix)
		}
	}
	return []byte(strings.NewReplacer("@EXEC@", strings.Join(quoteArgs(args), " "),
		"@CONFDIR@", o.ConfDir, "@CONFIGDIR@", o.ConfigDir).Replace(string(embedded("nftcni-agent.service"))))
}

// quoteArgs writes arguments as systemd reads them (systemd.service(5), command lines).
func quoteArgs(args []string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		a = strings.NewReplacer("%", "%%", "$", "$$").Replace(a)
		if a == "" || strings.ContainsAny(a, " \t\"'\\;") {
			a = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(a) + `"`
		}
		out[i] = a
	}
	return out
}

// takeOver moves the network configurations of others aside: the runtime gives new pods
// to nftcni as soon as its agent has written its own.
func (in *installer) takeOver() {
	for _, path := range othersConflists(in.in(in.ConfDir)) {
		if in.err != nil {
			return
		}
		note := describe(path)
		if in.err = disable(path); in.err == nil {
			in.did("moved aside", filepath.Join(in.ConfDir, filepath.Base(path)), note)
		}
	}
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
