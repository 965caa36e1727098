package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nftcni/nftcni/nft"
)

const apiBenchHeader = "| pods/policies | load | start s (CPU s) | pod created -> open | pod deleted -> shut | pod labelled -> open | pod labelled -> shut | policy created -> open | policy deleted -> shut | " +
	"policy created -> shut | policy deleted -> open | API calls (pod, label, policy) | open or shut after the last API answer (pod, label, policy) | 100 pods: last answer -> last open | CPU ms a probed change | a pod change | a policy change | RSS (settled, peak) MiB |\n" +
	"| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"

// run measures and prints one row: milliseconds as p50 (max).
func (n *apiBench) run(scale string) {
	rounds, err := strconv.Atoi(os.Getenv("ROUNDS"))
	if err != nil || rounds < 1 {
		rounds = 20
	}
	n.api.create(n.api.networking, "networkpolicies", benchNamespace(0), probePolicy("probe", "web", "client"))
	n.api.createPod(n.peer(extraAddr, "extra"))
	n.startAgent()
	n.process.await(n.b, n.runDir())
	startCPU := n.process.cpu()
	d := map[string][]time.Duration{}
	note := func(what, api string) func(total, call time.Duration) {
		return func(total, call time.Duration) {
			d[what], d[api] = append(d[what], total), append(d[api], call)
			d["after "+api] = append(d["after "+api], total-call)
		}
	}
	for range rounds {
		n.podRound(note)
	}
	n.labelRounds(rounds, note)
	for range rounds {
		n.policyRound(note)
	}
	probed := (n.process.cpu() - startCPU) / float64(8*rounds) * 1000
	burst := n.burst(100)
	podCPU, policyCPU := n.quietChanges(100)
	rss, peak := n.process.memory()
	n.settle()
	settled, _ := n.process.memory()
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Printf("| %s | %s | %.2f (%.2f) | %s | %s | %s | %s | %s | %s | %s | %s | %s, %s, %s | %s, %s, %s | %s | %.1f | %.1f | %.1f | %.0f (%.0f, %.0f) |\n", scale, strings.Fields(string(load))[0],
		n.process.ready.Seconds(), startCPU, milliseconds(d["pod+"]), milliseconds(d["pod-"]), milliseconds(d["label+"]), milliseconds(d["label-"]), milliseconds(d["allow+"]), milliseconds(d["allow-"]),
		milliseconds(d["deny+"]), milliseconds(d["deny-"]), milliseconds(d["pod API"]), milliseconds(d["label API"]), milliseconds(d["policy API"]),
		milliseconds(d["after pod API"]), milliseconds(d["after label API"]), milliseconds(d["after policy API"]), milliseconds(burst), probed, podCPU, policyCPU, rss, settled, peak)
	n.b.Logf("one call that changes a pod, sent -> first packet: label %s, delete %s; after its answer: label %s", quantiles(slices.Concat(d["label+"], d["label-"])), quantiles(d["pod-"]), quantiles(d["after label API"]))
	opened, attached := n.remoteAdds(5 * rounds)
	n.b.Logf("ADD on another node -> allowed here, by the annotation (%d pods): %s; the attachment itself: %s", len(opened), quantiles(opened), quantiles(attached))
	n.reboot()
	if err := errors.Join(n.process.stop(), nft.Delete(context.Background(), nft.Options{})); err != nil {
		n.b.Error(err)
	}
}

// reboot starts the agent on a node without a table while the API server is away: the
// last known objects come into force.
func (n *apiBench) reboot() {
	peer := n.peer(n.source(), "client")
	a := netip.MustParseAddr(peer.Status.PodIP)
	allowed := n.start(a, webAddr, false)
	n.opened(allowed, func() { n.api.createPod(peer) })
	if err := errors.Join(n.process.stop(), nft.Delete(context.Background(), nft.Options{})); err != nil {
		n.b.Fatal(err)
	}
	forbidden := n.start(extraAddr, webAddr, false)
	took, _ := n.shut(forbidden, func() { n.startAgent("--server", "https://127.0.0.1:1") })
	n.stop(forbidden)
	before, _, _ := allowed.state()
	n.until("an allowed peer without the API server", func() bool { _, last, _ := allowed.state(); return last > before+50 })
	n.stop(allowed)
	n.b.Logf("reboot without the API server: enforced %v after the agent's start", took.Round(time.Millisecond))
}

type noting func(what, api string) func(total, call time.Duration)

// podRound: a peer that a policy allows comes and goes.
func (n *apiBench) podRound(note noting) {
	a := n.source()
	pod := n.peer(a, "client")
	f := n.start(a, webAddr, false)
	defer n.stop(f)
	note("pod+", "pod API")(n.opened(f, func() { n.api.createPod(pod) }))
	note("pod-", "delete API")(n.shut(f, func() { n.api.delete(n.api.core, "pods", pod.Namespace, pod.Name) }))
}

// labelRounds: a peer that is there gets the label that a policy allows, and another one.
func (n *apiBench) labelRounds(rounds int, note noting) {
	a := n.source()
	pod := n.peer(a, "none")
	n.api.createPod(pod)
	for range rounds {
		f := n.start(a, webAddr, false)
		note("label+", "label API")(n.opened(f, func() { n.api.label(pod, "client") }))
		note("label-", "label API")(n.shut(f, func() { n.api.label(pod, "none") }))
		n.stop(f)
	}
	n.api.delete(n.api.core, "pods", pod.Namespace, pod.Name)
}

// settle waits until the agent has written its files and given back what that took.
func (n *apiBench) settle() {
	wait := time.NewTimer(25 * time.Second)
	defer wait.Stop()
	<-wait.C
}

// policyRound: a policy that allows one more peer, and one that isolates a pod.
func (n *apiBench) policyRound(note noting) {
	ns := benchNamespace(0)
	f := n.start(extraAddr, webAddr, false)
	note("allow+", "policy API")(n.opened(f, func() { n.api.create(n.api.networking, "networkpolicies", ns, probePolicy("extra", "web", "extra")) }))
	note("allow-", "policy API")(n.shut(f, func() { n.api.delete(n.api.networking, "networkpolicies", ns, "extra") }))
	n.stop(f)
	f = n.start(extraAddr, bareAddr, false)
	note("deny+", "policy API")(n.shut(f, func() { n.api.create(n.api.networking, "networkpolicies", ns, probePolicy("deny", "bare")) }))
	n.stop(f)
	f = n.start(extraAddr, bareAddr, false)
	note("deny-", "policy API")(n.opened(f, func() { n.api.delete(n.api.networking, "networkpolicies", ns, "deny") }))
	n.stop(f)
}

func burstSource(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 9, 128, byte(i)}) }

// burst is how long after the last API answer each of so many new peers got through.
func (n *apiBench) burst(pods int) []time.Duration {
	flows := make([]*datagramFlow, pods)
	each(pods, func(i int) { n.api.createPod(n.peer(burstSource(i), "client")) })
	answered := time.Now()
	for i := range flows {
		flows[i] = n.start(burstSource(i), webAddr, true)
	}
	n.until("100 pods open", func() bool {
		for _, f := range flows {
			if _, last, _ := f.state(); last < 0 {
				return false
			}
		}
		return true
	})
	var out []time.Duration
	for _, f := range flows {
		_, _, at := f.state()
		out = append(out, at.Sub(answered))
		n.stop(f)
	}
	each(pods, func(i int) {
		p := n.peer(burstSource(i), "client")
		n.api.delete(n.api.core, "pods", p.Namespace, p.Name)
	})
	return out
}

// quietChanges is the CPU time in ms of one change when nothing else happens: pods that
// a policy allows, and policies of a real pod, each made and deleted so many times.
func (n *apiBench) quietChanges(times int) (pod, policy float64) {
	measure := func(change func()) float64 {
		before := n.process.cpu()
		for range times {
			change()
		}
		return (n.process.cpu() - before) / float64(2*times) * 1000
	}
	pod = measure(func() {
		p := n.peer(n.source(), "client")
		n.api.createPod(p)
		n.api.delete(n.api.core, "pods", p.Namespace, p.Name)
	})
	policy = measure(func() {
		p := probePolicy("quiet", "web", "extra")
		n.api.create(n.api.networking, "networkpolicies", p.Namespace, p)
		n.api.delete(n.api.networking, "networkpolicies", p.Namespace, p.Name)
	})
	return pod, policy
}
