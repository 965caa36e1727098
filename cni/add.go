package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/vishvananda/netns"

	"github.com/nftcni/nftcni/ipam"
)

// undoTimeout is the time an ADD that failed has to clean up.
const undoTimeout = 15 * time.Second

// adding is one ADD on its way.
type adding struct {
	*Plugin
	*call
	agent  *Client
	ready  Ready
	record record
	wire   *wire
	got    allocation
}

// add wires the pod. Nothing is left of it when it fails: teardown undoes any part of it,
// from the record alone, as it does for DEL and for a plugin that was killed. The host's routes come last, after the agent's word that the kernel acknowledged the
// pod's policy, so no packet can be routed to the pod before.
func (p *Plugin) add(ctx context.Context, c *call) error {
	a := &adding{Plugin: p, call: c, agent: NewClient(c.conf.RunDir)}
	if err := a.prepare(ctx); err != nil {
		return err
	}
	defer a.wire.close()
	lock, err := lockAttachment(ctx, c.conf.RunDir, a.record.HostInterface)
	if err != nil {
		return err
	}
	defer lock.unlock()
	if err := a.clearLeftover(ctx); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{{"lease", a.leaseAddresses}, {"record", a.writePending}, {"link", a.makeLink}, {"pod", a.setUpPod}, {"host", a.setUpHost}, {"bandwidth", a.limitBandwidth},
		{"attach", a.attach}, {"routes", a.addRoutes}, {"result", a.finish}} {
		if err := step.run(ctx); err != nil {
			return a.fail(ctx, err)
		}
		p.done("add " + step.name)
	}
	return nil
}

// fail undoes what was done, with the time it needs even when ctx is over. What cannot be
// undone is on record for the agent.
func (a *adding) fail(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if undoErr := a.teardown(a.record).run(ctx); undoErr != nil {
		a.report(fmt.Sprintf("undo ADD of %s: %v", a.record.HostInterface, undoErr))
	}
	return err
}

func (a *adding) teardown(r record) teardown {
	return teardown{record: r, runDir: a.conf.RunDir, host: a.wire.host, report: a.report, done: func(string) {},
		detach: func(ctx context.Context) error { return a.agent.Detach(ctx, detachRequest(r.Attachment)) }}
}

// prepare changes nothing: it looks at the agent and the namespace.
func (a *adding) prepare(ctx context.Context) error {
	var err error
	if a.ready, err = a.agent.Ready(ctx); err != nil {
		return tryLater("%v", err)
	}
	if !a.ready.Ready {
		return tryLater("the nftcni agent is not ready: %s", a.ready.Reason)
	}
	if a.wire, err = openWire(a.netns); err != nil {
		return badEnv("CNI_NETNS: %v", err)
	}
	if same, err := sameAsOurs(a.wire.podNS); err == nil && same && !a.override {
		a.wire.close()
		return badEnv("CNI_NETNS: %s is the node's own network namespace", a.netns)
	}
	a.record = record{Attachment: Attachment{
		Network: a.conf.Name, ContainerID: a.containerID, Interface: a.ifname, NetNS: a.netns,
		HostInterface: HostInterface(a.containerID, a.ifname),
		Namespace:     a.args.namespace, Pod: a.args.pod, UID: a.args.uid,
		Labels: a.conf.labels, Masquerade: a.conf.IPMasq,
	}, Pending: true, StateDir: a.conf.StateDir, Bandwidth: a.conf.RuntimeConfig.Bandwidth}
	if a.conf.delegated() {
		a.record.Delegate = a.delegate()
	}
	w := a.wire
	w.hostName, w.name = a.record.HostInterface, a.ifname
	w.hostMAC, w.podMAC = hostMAC(a.containerID, a.ifname), podMAC(a.containerID, a.ifname)
	if a.conf.mac != nil {
		w.podMAC = a.conf.mac
	}
	a.record.HostMAC, a.record.PodMAC, a.record.MTU = w.hostMAC.String(), w.podMAC.String(), a.mtu()
	return nil
}

func sameAsOurs(ns netns.NsHandle) (bool, error) {
	own, err := netns.Get()
	if err != nil {
		return false, fmt.Errorf("open own network namespace: %w", err)
	}
	defer func() { _ = own.Close() }()
	return own.Equal(ns), nil
}

func (a *adding) mtu() int {
	switch {
	case a.conf.MTU != 0:
		return a.conf.MTU
	case a.ready.MTU != 0:
		return a.ready.MTU
	default:
		return uplinkMTU(a.wire.host)
	}
}

// clearLeftover refuses a second ADD of a live attachment and removes what a killed
// plugin, or one from before the namespace was lost, left under the same key.
func (a *adding) clearLeftover(ctx context.Context) error {
	old, err := readRecord(a.conf.RunDir, a.record.HostInterface)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := a.wire.host.LinkByName(a.record.HostInterface); ignoreNoLink(err) != nil || err == nil {
			return badEnv("CNI_CONTAINERID, CNI_IFNAME: %s exists already (%v); DEL must come before another ADD", a.record.HostInterface, err)
		}
		return nil
	case err != nil:
		return err
	}
	if _, err := a.wire.host.LinkByName(a.record.HostInterface); err == nil && !old.Pending && !old.Deleting {
		return badEnv("CNI_CONTAINERID, CNI_IFNAME: container %s has interface %s already; DEL must come before another ADD", a.containerID, a.ifname)
	}
	return a.teardown(old).run(ctx)
}

func detachRequest(a Attachment) DetachRequest {
	return DetachRequest{ContainerID: a.ContainerID, Interface: a.Interface, HostInterface: a.HostInterface}
}

func (a *adding) leaseAddresses(ctx context.Context) error {
	var err error
	if d := a.record.Delegate; d != nil {
		a.got, err = d.add(ctx, a.record, a.Stderr)
	} else {
		a.got, err = a.leaseOwn(ctx)
	}
	if err != nil {
		return err
	}
	a.record.Addresses, a.record.Pools, a.wire.addresses = a.got.addresses, a.got.pools, a.got.addresses
	if a.record.HostPorts, err = a.conf.hostPorts(a.got.addresses); err != nil {
		return err
	}
	a.wire.localnet = fromLoopback(a.record.HostPorts)
	if _, has6 := a.wire.families(); has6 && a.record.MTU < minMTU6 {
		return wrong("mtu: %d is less than the %d that IPv6 needs; raise it, or give the network IPv4 ranges only", a.record.MTU, minMTU6)
	}
	return nil
}

func (a *adding) leaseOwn(ctx context.Context) (allocation, error) {
	got := allocation{routes: a.conf.routes, pools: subnets(a.conf.pools)}
	pools := a.conf.pools
	if len(pools) == 0 {
		var err error
		if pools, err = nodePools(a.ready.PodCIDRs); err != nil {
			return got, err
		}
		if len(pools) == 0 {
			return got, wrong("ipam: has no subnet, and the agent knows no podCIDRs of this node; " +
				"write ipam.subnet or ipam.ranges, or set the Node's spec.podCIDRs or the agent's podCIDRs")
		}
	}
	a.record.Pools = got.pools
	var err error
	got.addresses, err = a.acquire(ctx, a.call, a.record, pools, addressInUse(a.wire.host))
	var owned *ipam.OwnedError
	if errors.As(err, &owned) {
		// We hold the attachment's lock and it has neither record nor link: a plugin was
		// killed before it could write the record.
		if err := release(ctx, a.conf.RunDir, a.record, a.report); err != nil {
			return got, err
		}
		got.addresses, err = a.acquire(ctx, a.call, a.record, pools, addressInUse(a.wire.host))
	}
	return got, err
}

func (a *adding) writePending(context.Context) error {
	return writeRecord(a.conf.RunDir, a.record)
}

func (a *adding) makeLink(context.Context) error {
	if err := a.wire.makeLink(a.record.MTU); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return badEnv("CNI_IFNAME: %v", err)
		}
		return err
	}
	return nil
}

func (a *adding) setUpPod(context.Context) error {
	var sysctls []setting
	for key, value := range a.conf.Sysctl {
		path, err := sysctlPath(key, a.ifname)
		if err != nil {
			return wrong("sysctl: %v", err)
		}
		sysctls = append(sysctls, setting{path, value})
	}
	return a.wire.setUpPod(a.got.routes, sysctls)
}

func (a *adding) setUpHost(context.Context) error {
	name := a.args.podName()
	if name != "" {
		name += " "
	}
	return a.wire.setUpHost((name + a.containerID)[:min(len(name)+len(a.containerID), 255)]) // IFALIASZ
}

func (a *adding) attach(ctx context.Context) error {
	_, err := a.agent.Attach(ctx, a.record.Attachment)
	return err
}

func (a *adding) addRoutes(ctx context.Context) error {
	if err := a.wire.addHostRoutes(); err != nil {
		return err
	}
	return a.wire.awaitCarrier(ctx)
}

// finish prints the result, then takes Pending off the record, in this order: a plugin
// killed in between leaves an ADD that the runtime counts as failed, and so do we. The
// record is written before, so that the disk can refuse it while there is time to fail.
func (a *adding) finish(context.Context) error {
	res, err := a.result().GetAsVersion(a.conf.CNIVersion)
	if err != nil {
		return fmt.Errorf("convert result to version %s: %w", a.conf.CNIVersion, err)
	}
	final := a.record
	final.Pending = false
	staged, err := stageRecord(a.conf.RunDir, final)
	if err != nil {
		return err
	}
	a.done("add final")
	if err := res.PrintTo(a.Stdout); err != nil {
		return fmt.Errorf("print result: %w", err)
	}
	a.done("add print")
	if err := os.Rename(staged, recordPath(a.conf.RunDir, a.record.HostInterface)); err != nil {
		return fmt.Errorf("complete attachment %s: %w", a.record.HostInterface, err)
	}
	return nil
}
