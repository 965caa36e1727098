package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/nftcni/nftcni/cni"
)

// remoteNode is where the pods of remoteAdds start; its podCIDR is part of what the sender has.
const remoteNode = "remote"

// remoteAdds attaches pods at the agent of another node, which knows them from the API
// server, and tells how long after the attachment began this node lets them in (a probe a
// millisecond), and how long the attachment itself took. The kubelet's status never
// comes: what opens is the annotation.
func (n *apiBench) remoteAdds(rounds int) (opened, attached []time.Duration) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: remoteNode}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.9.200.0/24"}}}
	n.api.ensure("nodes", node)
	run, stop := n.startRemoteAgent()
	client := cni.NewClient(run)
	for i := range rounds {
		a := netip.AddrFrom4([4]byte{10, 9, 200, byte(i + 1)})
		pod := newBenchPod(benchNamespace(0), fmt.Sprintf("add-%d", i), remoteNode, map[string]string{"role": "client"})
		pod.Status = corev1.PodStatus{}
		n.api.check(n.api.core.Post().Namespace(pod.Namespace).Resource("pods").Body(pod).Do(context.Background()).Into(pod))
		f := n.start(a, webAddr, false)
		total, add := n.opened(f, func() {
			_, err := client.Attach(n.b.Context(), cni.Attachment{
				Network: "bench", ContainerID: pod.Name, Interface: "eth0", HostInterface: fmt.Sprintf("nft%012x", i),
				Namespace: pod.Namespace, Pod: pod.Name, UID: string(pod.UID), Addresses: []netip.Addr{a},
			})
			n.api.check(err)
		})
		opened, attached = append(opened, total), append(attached, add)
		n.stop(f)
		n.api.delete(n.api.core, "pods", pod.Namespace, pod.Name)
	}
	if err := stop(); err != nil {
		n.b.Error(err)
	}
	return opened, attached
}

// startRemoteAgent starts the agent of remoteNode in a network namespace of its own, from
// which the API server is reached through this process.
func (n *apiBench) startRemoteAgent() (run string, stop func() error) {
	dir := filepath.Join(n.dir, "remote-"+fmt.Sprint(n.pods))
	run = filepath.Join(dir, "run")
	config := filepath.Join(dir, "agent.yaml")
	text := fmt.Sprintf("node: %s\nrunDir: %s\nstateDir: %s\nlogLevel: error\nmesh: {mode: none}\n", remoteNode, run, filepath.Join(dir, "state"))
	if err := errors.Join(os.MkdirAll(run, 0o700), os.WriteFile(config, []byte(text), 0o600)); err != nil {
		n.b.Fatal(err)
	}
	netns, err := newNetNS()
	if err != nil {
		n.b.Fatal(err)
	}
	var ln net.Listener
	var p *benchAgent
	err = inNetNS(netns, func() (err error) {
		if ln, err = net.Listen("tcp", "127.0.0.1:16443"); err == nil {
			p = startBenchAgent(n.b, filepath.Join(filepath.Dir(n.dir), "nftcni"), "--config", config, "--kubeconfig", filepath.Join(n.dir, "kubeconfig"))
		}
		return err
	})
	if err != nil {
		n.b.Fatal(err)
	}
	go relay(ln, "127.0.0.1:16443")
	p.await(n.b, run)
	return run, func() error { return errors.Join(p.stop(), ln.Close()) }
}

// relay hands what is accepted on to an address that this process reaches.
func relay(ln net.Listener, to string) {
	for {
		in, err := ln.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", to)
		if err != nil {
			_ = in.Close()
			continue
		}
		pass := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			_ = errors.Join(to.Close(), from.Close())
		}
		go pass(in, out)
		go pass(out, in)
	}
}

// quantiles of d in milliseconds.
func quantiles(d []time.Duration) string {
	slices.Sort(d)
	at := func(p int) float64 { return float64(d[min(len(d)*p/100, len(d)-1)].Microseconds()) / 1000 }
	return strings.TrimSpace(fmt.Sprintf("p50 %.1f, p99 %.1f, most %.1f ms", at(50), at(99), at(100)))
}
