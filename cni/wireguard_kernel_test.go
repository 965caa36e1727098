package cni

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hasWireGuard tells whether this kernel has it. The tests run under others through run-in-vm.
func hasWireGuard(t *testing.T) bool {
	t.Helper()
	needNode(t)
	n := newLabNS(t)
	err := (&wireGuard{ns: int(n.fd)}).probe(n.h)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
	return err == nil
}

func needWireGuard(t *testing.T) {
	t.Helper()
	if !hasWireGuard(t) {
		t.Skipf("kernel %s has no WireGuard", kernelRelease())
	}
}

func TestKernelWireGuardMissing(t *testing.T) {
	if hasWireGuard(t) {
		t.Skip("this kernel has WireGuard")
	}
	n := newLabNS(t)
	_, err := NewMesh(MeshConfig{Encrypt: EncryptWireGuard, StateDir: t.TempDir(), NetNS: int(n.fd)})
	if err == nil || !strings.Contains(err.Error(), "CONFIG_WIREGUARD") || !strings.Contains(err.Error(), "encrypt to none") {
		t.Errorf("NewMesh gives %v, want the remedy", err)
	}
}

// cleartext is what exchange sends, as a sniffer would see it.
var cleartext = bytes.Repeat([]byte("x"), 100)

func inTheClear(frame []byte) bool { return bytes.Contains(frame, cleartext) }

// sniff counts the frames in a namespace, and those that hit, until stop is called.
func (n *labNS) sniff(hit func(frame []byte) bool) (stop func() (frames, hits int)) {
	n.t.Helper()
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network byte order
	var fd int
	n.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
		return err
	})
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) != nil { // in a user namespace
		n.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 64<<20))
	}
	frames, hits, done := 0, 0, make(chan struct{})
	end := []byte("end of capture")
	go func() {
		defer close(done)
		buf := make([]byte, 1<<17)
		for {
			k, _, err := unix.Recvfrom(fd, buf, 0)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil || bytes.HasSuffix(buf[:k], end):
				return
			}
			frames++
			if hit(buf[:k]) {
				hits++
			}
		}
	}()
	return func() (int, int) {
		// A frame of our own through lo is behind all that came before.
		lo := n.link("lo").Attrs().Index
		frame := append(make([]byte, 14), end...)
		n.must(unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Protocol: all, Ifindex: lo, Halen: 6}))
		<-done
		_ = unix.Close(fd)
		return frames, hits
	}
}

func TestKernelWireGuard(t *testing.T) {
	needWireGuard(t)
	for _, tt := range []struct {
		name string
		labShape
		podMTU int
	}{
		{"mixed dual", dual, 1440},
		{"one link v4", labShape{links: []int{1, 1, 1}, nodes4: true, pods4: true}, 1440},
		{"router v6", labShape{links: []int{1, 2, 3}, nodes6: true, pods6: true}, 1420},
		{"v4 pods over v6 nodes", labShape{links: []int{1, 1, 2}, nodes6: true, pods4: true}, 1420},
	} {
		t.Run(strings.ReplaceAll(tt.name, " ", "_"), func(t *testing.T) {
			l := newLab(t, tt.labShape, MeshConfig{Encrypt: EncryptWireGuard})
			stop := l.router.sniff(inTheClear)
			l.set()
			l.idle()
			l.talkAll()
			l.idle()
			if frames, hits := stop(); hits != 0 || frames == 0 {
				t.Errorf("%d of %d frames between the nodes were in the clear", hits, frames)
			}
			if got := l.nodes[0].mesh.MTU(); got != tt.podMTU {
				t.Errorf("MTU %d, want %d", got, tt.podMTU)
			}
		})
	}
}

// The sniffer must see what is not encrypted, or the test above proves nothing.
func TestKernelSnifferSeesPlaintext(t *testing.T) {
	l := newLab(t, dual, MeshConfig{})
	stop := l.router.sniff(inTheClear)
	l.set()
	l.talkAll()
	if frames, hits := stop(); hits == 0 {
		t.Errorf("none of %d frames was in the clear", frames)
	}
}

// Flows spread over source ports, so that cards and links with several queues spread them too.
func TestKernelVXLANSourcePorts(t *testing.T) {
	l := newLab(t, labShape{links: []int{1, 2}, nodes4: true, pods4: true}, MeshConfig{})
	l.set()
	const header = 14 + 20 // Ethernet and IPv4, before UDP
	ports := map[uint16]bool{}
	stop := l.router.sniff(func(f []byte) bool {
		vxlan := len(f) > header+8 && f[14] == 0x45 && f[14+9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(f[header+2:]) == DefaultVXLANPort
		if vxlan {
			ports[binary.BigEndian.Uint16(f[header:])] = true
		}
		return vxlan
	})
	const flows = 20
	from, to := l.nodes[0], l.nodes[1]
	for range flows {
		if err := exchange(from.pod, to.pod, to.pods[0], from.pods[0]); err != nil {
			t.Fatal(err)
		}
	}
	if _, hits := stop(); hits == 0 || len(ports) < flows {
		t.Errorf("%d VXLAN packets of %d flows used %d source ports, want at least one for each flow", hits, 2*flows, len(ports))
	}
}

func TestKernelWireGuardFailsClosed(t *testing.T) {
	needWireGuard(t)
	l := newLab(t, labShape{links: []int{1, 1, 2}, nodes4: true, pods4: true}, MeshConfig{Encrypt: EncryptWireGuard})
	l.set()
	n, far := l.nodes[0], l.nodes[2]
	stop := l.router.sniff(inTheClear)

	n.must(n.h.LinkDel(n.link(wireGuardDevice(0))))
	if err := exchange(n.pod, far.pod, far.pods[0], n.pods[0]); err == nil {
		t.Error("without the device the pod is reached")
	}
	n.set()
	l.talkAll()

	keyless := slices.Clone(n.peers)
	keyless[2].PublicKey = ""
	r, err := n.mesh.Set(t.Context(), n.self, keyless)
	if err != nil || len(r.Problems) != 1 || r.Problems[0].Peer != "n3" {
		t.Errorf("a peer without a key: %v, %v", r.Problems, err)
	}
	if err := exchange(n.pod, far.pod, far.pods[0], n.pods[0]); err == nil {
		t.Error("a peer without a key is reached")
	}
	if frames, hits := stop(); hits != 0 || frames == 0 {
		t.Errorf("%d of %d frames were in the clear", hits, frames)
	}

	// While encryption is being switched on: node 3 has no key yet, and says so.
	open, err := NewMesh(MeshConfig{Encrypt: EncryptWireGuard, AllowPlaintext: true, StateDir: n.state, NetNS: int(n.fd)})
	n.must(err)
	defer open.Close()
	plain, err := NewMesh(MeshConfig{StateDir: far.state, NetNS: int(far.fd)})
	far.must(err)
	defer plain.Close()
	if _, err := open.Set(t.Context(), n.self, keyless); err != nil {
		t.Fatal(err)
	}
	if _, err := plain.Set(t.Context(), far.self, far.peers); err != nil {
		t.Fatal(err)
	}
	if err := exchange(n.pod, far.pod, far.pods[0], n.pods[0]); err != nil {
		t.Errorf("plaintext is allowed: %v", err)
	}
	if err := exchange(n.pod, l.nodes[1].pod, l.nodes[1].pods[0], n.pods[0]); err != nil {
		t.Errorf("the peer that has a key: %v", err)
	}
}

func (l *lab) publish() {
	for i, n := range l.nodes {
		for _, other := range l.nodes {
			other.peers[i].PublicKey = n.mesh.PublicKey()
		}
	}
}

// Two nodes change their keys at the same time, one tells its peers late, and a stream of datagrams
// between all pods loses none.
func TestKernelWireGuardRotates(t *testing.T) {
	needWireGuard(t)
	l := newLab(t, labShape{links: []int{1, 1, 2}, nodes4: true, pods4: true, pods6: true}, MeshConfig{Encrypt: EncryptWireGuard})
	l.set()
	l.talkAll()
	var reports []<-chan Report
	for _, n := range l.nodes {
		reports = append(reports, n.run())
	}
	stop := l.stream()
	for round := range 3 {
		for i := range l.nodes {
			if i != round { // all but one
				if _, err := l.nodes[i].mesh.RotateKey(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}
		l.publish()
		for _, n := range l.nodes {
			n.set()
		}
		for i, n := range l.nodes {
			if n.mesh.Report().Rotating != 0 {
				until(t, reports[i], "all peers have moved", func(Report) bool { return n.mesh.Report().Rotating == 0 })
			}
		}
		for i, n := range l.nodes {
			if r, err := n.mesh.Rotation(); err != nil || r.Active != (i != round) || r.Moving != 0 || r.Active && r.Received == 0 {
				t.Errorf("node %d after the move: %+v, %v", i+1, r, err)
			}
			if _, err := n.mesh.RetireKey(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		l.publish()
		for _, n := range l.nodes {
			n.set()
		}
	}
	for _, n := range l.nodes {
		if r, err := n.mesh.Rotation(); err != nil || r != (Rotation{}) {
			t.Errorf("after the rotation: %+v, %v", r, err)
		}
	}
	sent, lost := stop()
	t.Logf("%d datagrams sent, %d lost", sent, lost)
	if sent < 100 || lost != 0 {
		t.Errorf("%d of %d datagrams were lost", lost, sent)
	}
	l.idle()
	l.talkAll()
	for _, n := range l.nodes {
		keys, err := loadPrivateKeys(n.state)
		if err != nil || keys.public().String() != n.mesh.PublicKey() || len(keys.list()) != 1 {
			t.Errorf("keys kept: %v, published %s, %v", len(keys.list()), n.mesh.PublicKey(), err)
		}
	}
}

// stream sends datagrams from every pod to every other at a steady pace until stop, which counts
// those that did not arrive.
func (l *lab) stream() (stop func() (sent, lost int)) {
	var conns []net.PacketConn // two a node: IPv4, IPv6
	var received atomic.Int64
	var receivers sync.WaitGroup
	// One socket a family: whether package net makes sockets for both depends on the network namespace
	// it first looked at.
	for _, n := range l.nodes {
		for _, network := range []string{"udp4", "udp6"} {
			n.pod.do(func() error {
				c, err := net.ListenPacket(network, ":9")
				conns = append(conns, c)
				return err
			})
		}
	}
	for _, c := range conns {
		receivers.Go(func() {
			buf := make([]byte, 100)
			for {
				if _, _, err := c.ReadFrom(buf); err != nil {
					return
				}
				received.Add(1)
			}
		})
	}
	quit, done := make(chan struct{}), make(chan int)
	go func() {
		total := 0
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				done <- total
				return
			case <-tick.C:
				total += l.burst(conns)
			}
		}
	}()
	return func() (int, int) {
		close(quit)
		total := <-done
		for limit := time.Now().Add(5 * time.Second); int(received.Load()) < total && time.Now().Before(limit); {
			runtime.Gosched()
		}
		for _, c := range conns {
			_ = c.Close()
		}
		receivers.Wait()
		return total, total - int(received.Load())
	}
}

// burst sends one datagram from every pod to every address of every other, and counts those the
// kernel took.
func (l *lab) burst(conns []net.PacketConn) (sent int) {
	for i := range l.nodes {
		for j, to := range l.nodes {
			for _, addr := range to.pods {
				if i == j {
					continue
				}
				c := conns[2*i]
				if addr.Is6() {
					c = conns[2*i+1]
				}
				if _, err := c.WriteTo([]byte("x"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 9))); err != nil {
					l.t.Errorf("send to %s: %v", addr, err)
				}
				sent++
			}
		}
	}
	return sent
}
