package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// needShaping skips where the kernel lacks a part, and says which.
func needShaping(t *testing.T) {
	t.Helper()
	needNode(t)
	h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
	defer h.Close()
	ifb, err := makeIFB(h, "nfbprobe", 1500)
	if err == nil {
		defer func() { _ = unmakeLink(h, "nfbprobe") }()
		err = errors.Join(addTBF(h, ifb, makeBucket(1e6, 0, 1500)), h.QdiscAdd(ingressQdisc(ifb)))
	}
	if err == nil {
		err = h.FilterAdd(redirect(ifb, ifb))
	}
	if err != nil {
		t.Skipf("ifb, sch_tbf, sch_ingress, cls_u32 or act_mirred is missing: %v", err)
	}
}

// shaped is the plugin's configuration for pods that may have limits.
const shaped = `{"capabilities": {"bandwidth": true}, ` + `"ipam": {"type": "nftcni-ipam", "ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]]}}`

func limits(ingress, egress uint64) map[string]any {
	b := bandwidth{IngressRate: ingress, EgressRate: egress}
	if ingress > 0 {
		b.IngressBurst = math.MaxUint32 // what containerd writes
	}
	if egress > 0 {
		b.EgressBurst = math.MaxUint32
	}
	return map[string]any{"bandwidth": b}
}

// TestKernelBandwidth sends through each direction: a token bucket never lets more through
// than its burst and its rate times the time, which a slow machine only makes easier.
func TestKernelBandwidth(t *testing.T) {
	needShaping(t)
	n := newNode(t)
	l := n.list("1.1.0", shaped)
	const rate, sent = 8_000_000, 1 << 20 // 1 MB/s
	peer := n.runtime("peer", n.pod("peer"))
	peerIP := n.mustAdd(l, peer).IPs
	defer n.mustDel(l, peer)
	for _, tt := range []struct {
		name            string
		ingress, egress uint64
		up              bool // the pod sends
		limited         bool
	}{
		{name: "to the pod", ingress: rate, limited: true},
		{name: "from the pod", egress: rate, up: true, limited: true},
		{name: "to a pod that sends slowly", egress: rate},
		{name: "from a pod that receives slowly", ingress: rate, up: true},
	} {
		for family, name := range []string{"IPv4", "IPv6"} {
			t.Run(tt.name+" "+name, func(t *testing.T) {
				before := n.snapshot()
				rt := n.runtime("a", n.pod("a"))
				defer n.kill("a")
				rt.CapabilityArgs = limits(tt.ingress, tt.egress)
				ip := n.mustAdd(l, rt).IPs
				began := time.Now()
				if tt.up {
					n.send(rt.NetNS, peer.NetNS, peerIP[family].Address.IP.String(), sent)
				} else {
					n.send(peer.NetNS, rt.NetNS, ip[family].Address.IP.String(), sent)
				}
				took := time.Since(began)
				t.Logf("%d bytes in %v", sent, took)
				if least := time.Duration(sent-leastBurst) * time.Second / (rate / 8); tt.limited && took < least {
					t.Errorf("%d bytes took %v, want %v at least", sent, took, least)
				}
				if got := n.shapedBytes("a", tt.up); tt.limited != (got > sent) {
					t.Errorf("%d bytes went through the limit of that direction, limited: %v", got, tt.limited)
				}
				if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
					t.Errorf("CHECK: %v", err)
				}
				n.mustDel(l, rt)
				n.same("ADD and DEL", before)
			})
		}
	}
}

// send has one namespace send bytes to another over TCP and waits until all have arrived.
func (n *node) send(from, to, address string, count int) {
	n.t.Helper()
	var ln net.Listener
	inside(n.t, to, func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(address, "7"))
		return err
	})
	if ln == nil {
		return
	}
	defer ln.Close()
	got := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			defer c.Close()
			var m int64
			if m, err = io.Copy(io.Discard, c); err == nil && m != int64(count) {
				err = fmt.Errorf("%d bytes of %d arrived", m, count)
			}
		}
		got <- err
	}()
	inside(n.t, from, func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(address, "7"), 5*time.Second)
		if err != nil {
			return err
		}
		_, err = c.Write(make([]byte, count))
		return errors.Join(err, c.Close(), <-got)
	})
}

// shapedBytes is what passed the tbf of a direction, -1 without one.
func (n *node) shapedBytes(id string, up bool) int64 {
	n.t.Helper()
	h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
	defer h.Close()
	name := HostInterface(id, "eth0")
	if up {
		name = ifbName(name)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return -1
	}
	for _, q := range must(h.QdiscList(link)) {
		if q.Type() == "tbf" {
			return int64(q.Attrs().Statistics.Basic.Bytes)
		}
	}
	return -1
}

// TestKernelBandwidthCheck takes each part of a limit away.
func TestKernelBandwidthCheck(t *testing.T) {
	needShaping(t)
	n := newNode(t)
	l := n.list("1.1.0", shaped)
	h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
	defer h.Close()
	index := func(name string) int { return must(h.LinkByName(name)).Attrs().Index }
	host := HostInterface("a", "eth0")
	for _, tt := range []struct {
		name   string
		damage func() error
		want   string
	}{
		{"tbf to the pod", func() error { return h.QdiscDel(&netlink.Tbf{QdiscAttrs: rootOf(index(host))}) }, "tbf of " + host + " is missing"},
		{"tbf from the pod", func() error { return h.QdiscDel(&netlink.Tbf{QdiscAttrs: rootOf(index(ifbName(host)))}) }, "tbf of nfb"},
		{"another rate", func() error {
			q := &netlink.Tbf{QdiscAttrs: rootOf(index(host)), Rate: 1e9, Limit: 1e6, Buffer: 1e6}
			return h.QdiscReplace(q)
		}, "1000000000 byte/s"},
		{"redirect", func() error { return h.QdiscDel(ingressQdisc(index(host))) }, "not redirected"},
		{"ifb down", func() error { return h.LinkSetDown(linkAt(index(ifbName(host)))) }, "is down"},
		{"no ifb", func() error { return unmakeLink(h, ifbName(host)) }, "is missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := n.snapshot()
			rt := n.runtime("a", n.pod("a"))
			defer n.kill("a")
			rt.CapabilityArgs = limits(1e6, 2e6)
			n.mustAdd(l, rt)
			check(t, n.cni.CheckNetworkList(t.Context(), l, rt))
			check(t, tt.damage())
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("CHECK: got %v, want %q", err, tt.want)
			}
			n.mustDel(l, rt)
			n.same("ADD and DEL", before)
		})
	}
}

func rootOf(link int) netlink.QdiscAttrs {
	return netlink.QdiscAttrs{LinkIndex: link, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
}

// TestKernelBandwidthGoes ends pods with limits in every way there is.
func TestKernelBandwidthGoes(t *testing.T) {
	needShaping(t)
	for _, how := range []string{"DEL", "DEL without a record", "agent after the namespace is gone", "agent after the namespace and the record are gone",
		"GC", "uninstall", "killed", "killed, then ADD again", "ADD over a lost one"} {
		t.Run(how, func(t *testing.T) {
			n := newNode(t)
			l := n.list("1.1.0", shaped)
			before := n.snapshot()
			rt := n.runtime("a", n.pod("a"))
			rt.CapabilityArgs = limits(1e6, 1e6)
			add := func() {
				if _, err := n.add(l, rt); err != nil && !strings.HasPrefix(how, "killed") {
					t.Fatal(err)
				}
			}
			if strings.HasPrefix(how, "killed") {
				n.killedAt("add bandwidth", add)
			} else {
				add()
			}
			if strings.Contains(how, "record") || how == "ADD over a lost one" {
				check(t, RemoveAttachment(n.run, HostInterface("a", "eth0")))
			}
			n.endShaped(how, l.Name, func() { n.mustDel(l, rt) }, add)
			n.same(how, before)
		})
	}
}

func (n *node) endShaped(how, network string, del, add func()) {
	switch how {
	case "DEL", "DEL without a record":
		del()
	case "agent after the namespace is gone", "agent after the namespace and the record are gone":
		n.kill("a")
		n.settle()
		n.reconcileUntilGone("a")
	case "GC":
		check(n.t, n.direct("GC", fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "runDir": %q, "stateDir": %q, "type": "nftcni",
			"cni.dev/valid-attachments": []}`, network, n.run, n.state)))
	case "uninstall":
		h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
		defer h.Close()
		left := must(FindLeftovers(h))
		if s := strings.Join(left.Strings(), ", "); !strings.Contains(s, ifbName(HostInterface("a", "eth0"))) {
			n.t.Errorf("left over: %s", s)
		}
		check(n.t, left.Remove(h))
		if again := must(FindLeftovers(h)).Strings(); len(again) != 0 {
			n.t.Errorf("left over after that: %v", again)
		}
		del()
	case "killed":
		n.reconcile()
	case "killed, then ADD again":
		add()
		del()
	case "ADD over a lost one":
		h := must(netlink.NewHandle(unix.NETLINK_ROUTE))
		defer h.Close()
		check(n.t, unmakeLink(h, HostInterface("a", "eth0")))
		add()
		del()
	}
}

// TestKernelBandwidthMissing has the kernel lack a part: nothing is left of the ADD, and the
// error says what to load.
func TestKernelBandwidthMissing(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code uint
		want string
	}{
		{unix.ENOENT, 2, "runtimeConfig.bandwidth.egressRate: the node's kernel has no ifb: load it (modprobe ifb)"},
		{unix.EOPNOTSUPP, 2, "kubernetes.io/egress-bandwidth"},
		{unix.EPERM, 999, "make nfb0: operation not permitted"},
	} {
		if err := asCNI(missingPart("egress", "ifb", "ifb", tt.err, "make nfb0")); err.Code != tt.code || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: got %d, %v, want %d and %q", tt.err, err.Code, err, tt.code, tt.want)
		}
	}
}

func TestBucket(t *testing.T) {
	for _, tt := range []struct {
		name        string
		rate, burst uint64
		mtu         int
		want        bucket
	}{
		{"no burst", 8_000_000, 0, 1500, bucket{1_000_000, 2_048_001, 131_072 + 25_000}},
		{"containerd's burst", 8_000_000, math.MaxUint32, 1500, bucket{1_000_000, 2_048_001, 131_072 + 25_000}},
		{"a tenth of a second", 800_000_000, 0, 1500, bucket{100_000_000, 1_562_501, 12_500_000}},
		{"a burst", 8_000_000, 8_000_000, 1500, bucket{1_000_000, 15_625_001, 1_025_000}},
		{"a burst of one packet", 8_000_000, 8, 1500, bucket{1_000_000, 23_657, 1514 + 25_000}},
		{"slowest", minRate, 0, 1500, bucket{125, math.MaxUint32, 131_072 + 3}},
		{"fastest", maxRate, 0, 65535, bucket{125_000_000_000_000, 269, math.MaxUint32}},
	} {
		if got := makeBucket(tt.rate, tt.burst, tt.mtu); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// TestBandwidthOff wants a pod without limits to have nothing of it on record.
func TestBandwidthOff(t *testing.T) {
	b, err := json.Marshal(record{})
	if err != nil || bytes.Contains(b, []byte("andwidth")) {
		t.Errorf("got %s, %v", b, err)
	}
	a := adding{Plugin: &Plugin{}, call: &call{conf: &config{}}, wire: &wire{}}
	if err := a.limitBandwidth(context.Background()); err != nil { // no kernel is asked: there is no handle
		t.Error(err)
	}
}
