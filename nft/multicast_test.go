package nft_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft/nfttest"
)

// Options of a multicast router's socket, and the sizes of what it is given (include/uapi/linux/mroute.h).
const (
	mrtInit, mrtAddVif, mrtAddMFC = 200, 202, 204
	vifctlSize, mfcctlSize        = 16, 60
)

// routeMulticast makes the node a multicast router: what source sends to group leaves by all other links.
func routeMulticast(t *testing.T, source, group string, links ...string) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IGMP)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	set := func(option int, value []byte) {
		t.Helper()
		if err := unix.SetsockoptString(fd, unix.IPPROTO_IP, option, string(value)); err != nil {
			t.Skipf("no multicast routing (CONFIG_IP_MROUTE): %v", err)
		}
	}
	set(mrtInit, []byte{1, 0, 0, 0})
	mfc := append(append(addr(source).AsSlice(), addr(group).AsSlice()...), make([]byte, mfcctlSize-8)...)
	for i, name := range links {
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		vif := make([]byte, vifctlSize)
		binary.NativeEndian.PutUint16(vif, uint16(i))
		vif[2], vif[3] = 8, 1 // VIFF_USE_IFINDEX; a packet's TTL must be more than 1
		binary.NativeEndian.PutUint32(vif[8:], uint32(l.Attrs().Index))
		set(mrtAddVif, vif)
		mfc[10+i] = 1 // mfcc_ttls
	}
	mfc[10] = 255 // not back to where it came from
	for i := len(links); i < 32; i++ {
		mfc[10+i] = 255
	}
	set(mrtAddMFC, mfc)
}

// TestKernelRoutedMulticast: what a pod may send to the world is not live for a pod that is isolated, though a multicast
// router sends one connection's packets both ways; nor when the pod hides it from the kernel's packet type in a unicast frame.
func TestKernelRoutedMulticast(t *testing.T) {
	const group = "239.1.1.1"
	w := newWorld(t)
	routeMulticast(t, "10.9.0.2", group, w.client.Interface, w.outside.Interface, w.server.Interface)
	out, pod := member(t, w.outside, group), member(t, w.server, group)
	node, err := netlink.LinkByName(w.client.Interface)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []net.HardwareAddr{{1, 0, 0x5e, 1, 1, 1}, node.Attrs().HardwareAddr} {
		for range 4 {
			packet := ipv4("10.9.0.2", group, unix.IPPROTO_UDP, udp(4000, 9))
			if err := sendFrame(w.client, to, packet); err != nil {
				t.Fatal(err)
			}
		}
	}
	if o, p := out.Total(), pod.Total(); o != 8 || p != 0 {
		t.Errorf("the world heard %d of 8, want all; an isolated pod heard %d, want none", o, p)
	}
}

// member is a sink that is a member of a group.
func member(t *testing.T, h *nfttest.Host, group string) *nfttest.Sink {
	t.Helper()
	err := h.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return fmt.Errorf("find eth0: %w", err)
		}
		c, err := net.ListenMulticastUDP("udp4", eth0, &net.UDPAddr{IP: addr(group).AsSlice(), Port: 10})
		if err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return h.Sink(addr(group), 9)
}
