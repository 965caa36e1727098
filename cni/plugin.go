package cni

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/utils"
)

// callTimeout bounds one call. The kubelet gives a sandbox four minutes.
const callTimeout = 90 * time.Second

// Plugin is one call of the CNI plugin (CNI specification, section 2). Its environment
// and streams are fields, so that a call can be made without a process.
type Plugin struct {
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer

	// AfterStep, which only tests set, is called between any two steps with the name of the
	// step that was done; it may not return. Nothing in the product sets it.
	AfterStep func(done string)
}

// NewPlugin returns a Plugin of this process.
func NewPlugin() *Plugin {
	return &Plugin{Getenv: os.Getenv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
}

// Main is the CNI plugin of this process. It returns the exit status.
func Main() int {
	// A plugin lives for a few milliseconds: collecting its garbage only costs.
	debug.SetGCPercent(-1)
	return NewPlugin().Run(context.Background())
}

// IPAMMain is the IPAM plugin nftcni-ipam of this process. It returns the exit status.
func IPAMMain() int {
	debug.SetGCPercent(-1)
	return NewPlugin().RunIPAM(context.Background())
}

// Run does what CNI_COMMAND says as the interface plugin and returns the exit status: 0,
// or 1 after an error result.
func (p *Plugin) Run(ctx context.Context) int {
	return p.run(ctx, verbs{add: p.add, del: p.del, check: p.check, gc: p.gc, status: p.status})
}

// RunIPAM is Run as an IPAM plugin, for other interface plugins.
func (p *Plugin) RunIPAM(ctx context.Context) int {
	return p.run(ctx, verbs{add: p.ipamAdd, del: p.ipamDel, check: p.ipamCheck, gc: p.ipamGC, status: p.ipamStatus})
}

// verbs are the commands of an interface or an IPAM plugin.
type verbs struct {
	add, del, check, gc, status func(context.Context, *call) error
}

// call is one request: what the environment and the configuration say.
type call struct {
	command     string
	containerID string
	netns       string
	ifname      string
	args        podArgs
	rawArgs     string
	path        string // CNI_PATH
	override    bool   // CNI_NETNS_OVERRIDE: the runtime runs us in the pod's namespace
	conf        *config
}

// podArgs are the pairs of CNI_ARGS that Kubernetes runtimes set.
type podArgs struct{ namespace, pod, uid string }

func (p *Plugin) run(ctx context.Context, v verbs) int {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	version := ""
	err := func() error {
		if p.Getenv("CNI_COMMAND") == "VERSION" {
			return supported().Encode(p.Stdout)
		}
		raw, err := io.ReadAll(io.LimitReader(p.Stdin, maxConfig+1))
		if err != nil {
			return types.NewError(types.ErrIOFailure, fmt.Sprintf("read network configuration from stdin: %v", err), "")
		}
		c, err := p.readCall(raw)
		if err != nil {
			return err
		}
		version = c.conf.CNIVersion
		return v.run(ctx, c)
	}()
	if err == nil {
		return 0
	}
	if err := printError(p.Stdout, version, asCNI(err)); err != nil {
		_, _ = fmt.Fprintln(p.Stderr, "nftcni:", err)
	}
	return 1
}

// since is the first version of the specification that has a command.
func since(command string) []string {
	all := []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	switch command {
	case "CHECK":
		return all[1:]
	case "GC", "STATUS":
		return all[3:]
	default:
		return all
	}
}

func (v verbs) run(ctx context.Context, c *call) error {
	if known := since(c.command); !slices.Contains(known, c.conf.CNIVersion) {
		return types.NewError(types.ErrIncompatibleCNIVersion, fmt.Sprintf(
			"cniVersion: %s has no %s; write %s or newer", c.conf.CNIVersion, c.command, known[0]), "")
	}
	switch c.command {
	case "ADD":
		return v.add(ctx, c)
	case "DEL":
		return v.del(ctx, c)
	case "CHECK":
		return v.check(ctx, c)
	case "GC":
		return v.gc(ctx, c)
	case "STATUS":
		return v.status(ctx, c)
	default:
		return badEnv("CNI_COMMAND: %q is not ADD, DEL, CHECK, GC, STATUS or VERSION", c.command)
	}
}

// readCall checks the environment as the specification's section 2 asks.
func (p *Plugin) readCall(raw []byte) (*call, error) {
	override := p.Getenv("CNI_NETNS_OVERRIDE")
	c := &call{command: p.Getenv("CNI_COMMAND"), containerID: p.Getenv("CNI_CONTAINERID"), netns: p.Getenv("CNI_NETNS"),
		ifname: p.Getenv("CNI_IFNAME"), rawArgs: p.Getenv("CNI_ARGS"), path: p.Getenv("CNI_PATH"),
		override: override == "1" || strings.EqualFold(override, "true")}
	if slices.Contains([]string{"ADD", "DEL", "CHECK"}, c.command) {
		if err := c.checkEnv(); err != nil {
			return nil, err
		}
	}
	args, err := parseArgs(c.rawArgs)
	if err != nil {
		return nil, err
	}
	if c.command == "ADD" {
		if err := args.check(); err != nil {
			return nil, err
		}
	}
	c.args = args
	c.conf, err = parseConfig(raw)
	return c, err
}

func (c *call) checkEnv() error {
	for _, v := range []struct {
		name, value string
		check       func(string) *types.Error
	}{{"CNI_CONTAINERID", c.containerID, utils.ValidateContainerID}, {"CNI_IFNAME", c.ifname, utils.ValidateInterfaceName}} {
		if v.value == "" {
			return badEnv("%s: is missing", v.name)
		}
		if err := v.check(v.value); err != nil {
			return badEnv("%s: %v", v.name, err)
		}
	}
	if c.ifname == "lo" && c.command != "DEL" {
		return badEnv("CNI_IFNAME: lo is the loopback of every namespace; use another name, such as eth0")
	}
	if c.netns == "" && c.command != "DEL" {
		return badEnv("CNI_NETNS: is missing; it is the path of the container's network namespace")
	}
	return nil
}

// maxArgs bounds CNI_ARGS, in bytes.
const maxArgs = 1 << 16

// parseArgs reads CNI_ARGS ("K=V;K2=V2"). Unknown keys are left alone whether or not
// IgnoreUnknown is there: they are somebody else's.
func parseArgs(s string) (podArgs, error) {
	var a podArgs
	if len(s) > maxArgs {
		return a, badEnv("CNI_ARGS: is longer than %d bytes", maxArgs)
	}
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return podArgs{}, badEnv("CNI_ARGS: %q is not KEY=VALUE", pair)
		}
		switch k {
		case "K8S_POD_NAMESPACE":
			a.namespace = v
		case "K8S_POD_NAME":
			a.pod = v
		case "K8S_POD_UID":
			a.uid = v
		}
	}
	return a, nil
}

// check refuses names that no object can have, before they reach files, logs and terminals.
// Only ADD asks: what is there must be deletable whatever it is called.
func (a podArgs) check() error {
	for _, v := range [][2]string{{"K8S_POD_NAMESPACE", a.namespace}, {"K8S_POD_NAME", a.pod}} {
		if v[1] != "" && (len(v[1]) > 253 || !pluginName.MatchString(v[1])) {
			return badEnv("CNI_ARGS: %s: %.60q is not a name: use letters, digits, '-', '_' and '.', at most 253", v[0], v[1])
		}
	}
	return nil
}

// podName is namespace/name, or nothing outside Kubernetes.
func (a podArgs) podName() string {
	if a.pod == "" {
		return ""
	}
	return a.namespace + "/" + a.pod
}

// done tells a test that a step is behind us.
func (p *Plugin) done(step string) {
	if p.AfterStep != nil {
		p.AfterStep(step)
	}
}

func (p *Plugin) report(msg string) { _, _ = fmt.Fprintln(p.Stderr, "nftcni:", msg) }
