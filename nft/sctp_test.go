package nft_test

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// sctpSocket makes a one-to-one style socket (RFC 6458 section 4) in the host's namespace.
func sctpSocket(h *nfttest.Host, a netip.Addr, use func(fd int) error) error {
	return h.Do(func() error {
		family := unix.AF_INET
		if a.Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		if err != nil {
			return fmt.Errorf("sctp socket: %w", err)
		}
		return use(fd)
	})
}

func sctpAddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}

// sctpListen listens until the test ends; the kernel answers INIT by itself.
func sctpListen(t *testing.T, h *nfttest.Host, a netip.AddrPort) {
	t.Helper()
	err := sctpSocket(h, a.Addr(), func(fd int) error {
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Bind(fd, sctpAddr(a)); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		return unix.Listen(fd, 16)
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.ESOCKTNOSUPPORT) {
		t.Skipf("no SCTP sockets in this kernel: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// sctpConnects reports whether an association comes up within two seconds.
func sctpConnects(h *nfttest.Host, to netip.AddrPort) bool {
	return sctpSocket(h, to.Addr(), func(fd int) error {
		defer unix.Close(fd)
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: 2}); err != nil {
			return err
		}
		return unix.Connect(fd, sctpAddr(to))
	}) == nil
}

// TestKernelSCTP: associations of real sockets obey the policy, by a port of the node too.
func TestKernelSCTP(t *testing.T) {
	w := newWorld(t)
	sctp := put(policy.Key{Map: policy.AccessPort, X: classWeb, Protocol: policy.SCTP, First: 80}, policy.CodeAllow)
	finish(t, w.table, apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{sctp}}}, HostPorts: []nft.HostPort{
		hostPort(policy.SCTP, "0.0.0.0", 8080, "10.9.0.1", 80), hostPort(policy.SCTP, "::", 8080, "fd09::1", 80)}}))
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		sctpListen(t, w.server, at(a, 80))
		sctpListen(t, w.server, at(a, 81))
		want(t, "allowed client, port 80, "+a, sctpConnects(w.client, at(a, 80)), true)
		want(t, "allowed client, port 81, "+a, sctpConnects(w.client, at(a, 81)), false)
		want(t, "stranger, port 80, "+a, sctpConnects(w.stranger, at(a, 80)), false)
		want(t, "own node, port 81, "+a, sctpConnects(&w.Host, at(a, 81)), true)
	}
	for _, node := range []string{"198.51.100.1", "2001:db8:1::1"} {
		want(t, "allowed client, host port of "+node, sctpConnects(w.client, at(node, 8080)), true)
		want(t, "stranger, host port of "+node, sctpConnects(w.stranger, at(node, 8080)), false)
		want(t, "own node, its host port of "+node, sctpConnects(&w.Host, at(node, 8080)), true)
	}
}
