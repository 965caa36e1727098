package cni

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hasWireGuard tells whether this kernel has it. The tests run under others through run-in-vm.
func hasWireGuard(t *testing.T) bool {
	t.Helper()
	needNode(t)
	n := newLabNS(t)
	err := createWireGuard(n.h)
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

// sniff counts the frames in a namespace, and those that hold cleartext, until stop is called.
func (n *labNS) sniff() (stop func() (frames, hits int)) {
	n.t.Helper()
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in network byte order
	var fd int
	n.do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all)
		return err
	})
	n.must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
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
			if bytes.Contains(buf[:k], cleartext) {
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
			stop := l.router.sniff()
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
	stop := l.router.sniff()
	l.set()
	l.talkAll()
	if frames, hits := stop(); hits == 0 {
		t.Errorf("none of %d frames was in the clear", frames)
	}
}

func TestKernelWireGuardFailsClosed(t *testing.T) {
	needWireGuard(t)
	l := newLab(t, labShape{links: []int{1, 1, 2}, nodes4: true, pods4: true}, MeshConfig{Encrypt: EncryptWireGuard})
	l.set()
	n, far := l.nodes[0], l.nodes[2]
	stop := l.router.sniff()

	n.must(n.h.LinkDel(n.link(WireGuardDevice)))
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

func TestKernelWireGuardRotates(t *testing.T) {
	needWireGuard(t)
	l := newLab(t, dual, MeshConfig{Encrypt: EncryptWireGuard})
	l.set()
	l.talkAll()
	n := l.nodes[1]
	old := n.mesh.PublicKey()
	key, err := n.mesh.RotateKey(t.Context())
	if err != nil || key == old || key != n.mesh.PublicKey() {
		t.Fatalf("RotateKey gives %q after %q, %v", key, old, err)
	}
	for _, other := range l.nodes {
		other.peers[1].PublicKey = key
	}
	l.set()
	start := time.Now()
	l.talkAll()
	t.Logf("all pairs talk %v after the rotation", time.Since(start))
	again, err := loadPrivateKey(n.state)
	if err != nil || again.PublicKey().String() != key {
		t.Errorf("the new key is not kept: %v", err)
	}
	d, err := l.nodes[0].mesh.wg.client.Device(WireGuardDevice)
	n.must(err)
	if len(d.Peers) != 2 {
		t.Errorf("%d peers, want 2: the old key must be gone", len(d.Peers))
	}
}

func TestPrivateKeyFile(t *testing.T) {
	dir := t.TempDir()
	first, err := loadPrivateKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := loadPrivateKey(dir); err != nil || again != first {
		t.Errorf("read again: %v", err)
	}
	name := filepath.Join(dir, privateKeyFile)
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, tt := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"damaged", func() error { return os.WriteFile(name, []byte("x"), 0o600) }, "is damaged: remove it"},
		{"others may read it", func() error { return os.Chmod(name, 0o644) }, "chmod 600"},
		{"a link", func() error { return errors.Join(os.Remove(name), os.Symlink("/dev/zero", name)) }, "has mode"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.spoil(); err != nil {
				t.Fatal(err)
			}
			if _, err := loadPrivateKey(dir); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestPlanWireGuard(t *testing.T) {
	a, b := testKey(1), testKey(2)
	self := Peer{Name: "n1", Addrs: addrs("192.0.2.1"), PodCIDRs: prefixes("10.244.1.0/24")}
	peer := func(name, addr, cidr, key string) Peer {
		return Peer{Name: name, Addrs: addrs(addr), PodCIDRs: prefixes(cidr), PublicKey: key}
	}
	for _, tt := range []struct {
		name    string
		peers   []Peer
		via     string
		problem string
	}{
		{"a key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", a)}, "wireguard", ""},
		{"no key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", "")}, "unreachable", "not known"},
		{"damaged key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", "AAAA")}, "unreachable", "cannot be used"},
		{"our own key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", b)}, "unreachable", "this node's own"},
		{"one key twice", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", a), peer("n3", "192.0.2.3", "10.244.3.0/24", a)}, "wireguard unreachable", "another node has it"},
		{"no common family", []Peer{peer("n2", "2001:db8::2", "10.244.2.0/24", a)}, "unreachable", "no address family"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := MeshConfig{Encrypt: EncryptWireGuard}
			if err := cfg.complete(); err != nil {
				t.Fatal(err)
			}
			v := testView()
			v.key = wgKeyOf(t, b)
			state, r, err := cfg.planMesh(self, tt.peers, v)
			if err != nil {
				t.Fatal(err)
			}
			checkPlan(t, r, tt.via, tt.problem)
			for _, p := range r.Paths {
				if _, fenced := state.routes[routeKey{p.PodCIDR, fenceMetric}]; p.Via == ViaWireGuard && !fenced {
					t.Errorf("%s has no fence", p.PodCIDR)
				}
			}
		})
	}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
