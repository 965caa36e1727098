package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// demoNode is a node with the real agent and plugin in the calling process's network
// and mount namespaces; privateRun has been called. All its files are below /run.
type demoNode struct {
	name      string
	dir       string // everything of the demo's own
	manifests string
	source    []string             // flags of the agent that say where objects come from; nil: the manifests
	ends      map[string]*endpoint // the node and the outside host's addresses

	plugin   *libcni.CNIConfig
	network  *libcni.NetworkConfigList
	attached []attachedPod
	ownTable bool   // the agent's setting of that name
	settings string // more lines of the agent's configuration

	agent     *agent.Client
	stopAgent context.CancelFunc
	agentEnd  chan struct{} // closed when the agent is gone
	agentErr  error
	agentPID  int
}

// attachedPod is what a DEL repeats of its ADD.
type attachedPod struct {
	network *libcni.NetworkConfigList
	runtime *libcni.RuntimeConf
}

// agentPatience bounds every wait for the agent; an emulated machine may need half of it.
const agentPatience = 3 * time.Minute

// newDemoNode makes the node called name and a host outside with these addresses.
func newDemoNode(name string, outside map[string][]netip.Addr) (*demoNode, error) {
	n := &demoNode{name: name, dir: "/run/nftcni-demo", ownTable: true, ends: map[string]*endpoint{}}
	n.manifests = filepath.Join(n.dir, "manifests")
	for _, dir := range []string{n.manifests, n.path("bin"), n.path("state"), cni.DefaultRunDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own executable: %w", err)
	}
	if err := os.Symlink(self, n.path("bin/nftcni")); err != nil {
		return nil, err
	}
	own, err := ownNetNS()
	if err != nil {
		return nil, err
	}
	away, err := newNetNS()
	if err != nil {
		return nil, err
	}
	n.ends["node"] = &endpoint{name: "node", netns: own, addrs: addrsOf(nodePrefixes)}
	var all []netip.Addr
	for name, addrs := range outside {
		n.ends[name] = &endpoint{name: name, netns: away, addrs: addrs}
		all = append(all, addrs...)
	}
	if err := setUpNode(away, all); err != nil {
		return nil, err
	}
	n.plugin = libcni.NewCNIConfigWithCacheDir([]string{n.path("bin")}, n.path("cache"), nil)
	n.network, err = libcni.NetworkConfFromBytes(n.networkConfig())
	if err != nil {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	n.agent = agent.NewClient(filepath.Join(cni.DefaultRunDir, cni.SocketName))
	return n, nil
}

func (n *demoNode) path(rel string) string { return filepath.Join(n.dir, rel) }

// networkConfig leaves the addresses to the agent, which knows this node's podCIDRs.
func (n *demoNode) networkConfig() []byte {
	return fmt.Appendf(nil, `{"cniVersion": "1.1.0", "name": "demo", "plugins": [
		{"type": "nftcni", "ipMasq": true, "stateDir": %q}]}`, n.path("state"))
}

// startAgent starts `nftcni agent` and waits until it is ready.
func (n *demoNode) startAgent(ctx context.Context) error {
	config := fmt.Appendf(nil, "node: %s\nstateDir: %s\nownTable: %t\nlogLevel: debug\n%s", n.name, n.path("state"), n.ownTable, n.settings)
	if err := os.WriteFile(n.path("agent.yaml"), config, 0o644); err != nil {
		return err
	}
	log, err := os.OpenFile(n.path("agent.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the agent has its own descriptor
	ctx, n.stopAgent = context.WithCancel(ctx)
	args := append([]string{"agent", "--config", n.path("agent.yaml")}, n.source...)
	if n.source == nil {
		args = append(args, "--manifests", n.manifests)
	}
	cmd := exec.CommandContext(ctx, n.path("bin/nftcni"), args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	wait, err := startTied(cmd, 5*time.Second)
	if err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	end := make(chan struct{})
	n.agentEnd, n.agentPID = end, cmd.Process.Pid
	go func() {
		n.agentErr = wait()
		close(end)
	}()
	var ready cni.Ready
	err = n.until(ctx, func(ctx context.Context) bool {
		return n.agent.Get(ctx, cni.PathReady, &ready) == nil && ready.Ready
	})
	if err != nil && ready.Reason != "" {
		return fmt.Errorf("the agent is not ready (%s): %w", ready.Reason, err)
	}
	return err
}

// until asks again and again, a few milliseconds apart, until done says yes. It ends
// early when the agent is gone.
func (n *demoNode) until(ctx context.Context, done func(context.Context) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, agentPatience, fmt.Errorf("the agent has not answered within %v", agentPatience))
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !done(ctx) {
		select {
		case <-tick.C:
		case <-n.agentEnd:
			return n.withLog(fmt.Errorf("the agent ended: %w", n.agentErr))
		case <-ctx.Done():
			return n.withLog(context.Cause(ctx))
		}
	}
	return nil
}

// withLog adds the last lines of the agent's log to an error.
func (n *demoNode) withLog(err error) error {
	const most = 15
	log, _ := os.ReadFile(n.path("agent.log")) // without a log the error stands alone
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return fmt.Errorf("%w; the agent's last lines:\n%s", err, strings.Join(lines[max(0, len(lines)-most):], "\n"))
}

// attach makes a pod's network namespace and adds it to the network as a container
// runtime would, with more of CNI_ARGS than the pod's name where there are any.
func (n *demoNode) attach(ctx context.Context, network *libcni.NetworkConfigList, namespace, pod string, args ...[2]string) (*endpoint, error) {
	fd, err := newNetNS()
	if err != nil {
		return nil, err
	}
	name := namespace + "/" + pod
	rt := &libcni.RuntimeConf{
		ContainerID: "demo-" + namespace + "-" + pod, NetNS: netnsPath(fd), IfName: "eth0",
		Args: append([][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", pod}}, args...),
	}
	result, err := n.plugin.AddNetworkList(ctx, network, rt)
	if err != nil {
		return nil, n.withLog(fmt.Errorf("attach %s: %w", name, err))
	}
	n.attached = append(n.attached, attachedPod{network, rt})
	current, err := types100.NewResultFromResult(result)
	if err != nil {
		return nil, fmt.Errorf("attach %s: read the plugin's result: %w", name, err)
	}
	e := &endpoint{name: name, netns: fd}
	for _, ip := range current.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			e.addrs = append(e.addrs, a.Unmap())
		}
	}
	if len(e.addrs) == 0 {
		return nil, fmt.Errorf("attach %s: the plugin returned no address", name)
	}
	return e, nil
}

// change runs f, which alters the manifests, and returns how long the agent took from
// the first event of it to the kernel's last acknowledgement.
func (n *demoNode) change(ctx context.Context, f func() error) (time.Duration, error) {
	var status agent.Status
	if err := n.agent.Get(ctx, agent.PathStatus, &status); err != nil {
		return 0, err
	}
	before := status.Commits
	if err := f(); err != nil {
		return 0, err
	}
	err := n.until(ctx, func(ctx context.Context) bool {
		return n.agent.Get(ctx, agent.PathStatus, &status) == nil && status.Commits > before
	})
	if err != nil {
		return 0, fmt.Errorf("wait for the change: %w", err)
	}
	if status.LastCommit.Error != "" {
		return 0, n.withLog(fmt.Errorf("the agent could not apply the change: %s", status.LastCommit.Error))
	}
	var took int64
	for _, c := range status.Recent[max(0, len(status.Recent)-int(status.Commits-before)):] {
		took += c.Micros
	}
	return time.Duration(took) * time.Microsecond, nil
}

func (n *demoNode) detachAll(ctx context.Context) error {
	var errs []error
	for _, p := range n.attached {
		if err := n.plugin.DelNetworkList(ctx, p.network, p.runtime); err != nil {
			errs = append(errs, fmt.Errorf("detach %s: %w", p.runtime.ContainerID, err))
		}
	}
	n.attached = nil
	return errors.Join(errs...)
}

// checkEmpty makes sure that the DELs left no link and no attachment.
func (n *demoNode) checkEmpty() error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "nft") {
			return fmt.Errorf("link %s is left after DEL", l.Attrs().Name)
		}
	}
	left, err := os.ReadDir(filepath.Join(cni.DefaultRunDir, "attachments"))
	if err == nil && len(left) > 0 {
		return fmt.Errorf("attachment %s is left after DEL", left[0].Name())
	}
	return nil
}

// close stops the agent and waits for its end. The namespaces go with the process.
func (n *demoNode) close() error {
	if n.stopAgent == nil || n.agentEnd == nil {
		return nil
	}
	select {
	case <-n.agentEnd:
		return fmt.Errorf("the agent ended early: %w", n.agentErr)
	default:
	}
	n.stopAgent()
	<-n.agentEnd
	if n.agentErr != nil && !errors.Is(n.agentErr, context.Canceled) {
		return n.withLog(fmt.Errorf("the agent did not stop cleanly: %w", n.agentErr))
	}
	if b, err := os.ReadFile(n.path("agent.log")); err == nil && bytes.Contains(b, []byte("panic:")) {
		return n.withLog(errors.New("the agent panicked"))
	}
	return nil
}
