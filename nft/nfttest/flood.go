package nfttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// batch is how many datagrams one system call sends or reads at most: under an emulated kernel the calls
// cost more than the packets.
const batch = 64

// batches reads and writes many datagrams at once; ipv4 and ipv6 share the type of a message.
type batches interface {
	ReadBatch([]ipv4.Message, int) (int, error)
	WriteBatch([]ipv4.Message, int) (int, error)
}

func batchesOf(c net.PacketConn, a netip.Addr) batches {
	if a.Is6() {
		return ipv6.NewPacketConn(c)
	}
	return ipv4.NewPacketConn(c)
}

func messages(size int) []ipv4.Message {
	out := make([]ipv4.Message, batch)
	for i := range out {
		out[i].Buffers = [][]byte{make([]byte, size)}
	}
	return out
}

// Sink counts datagrams that arrive on a UDP port.
type Sink struct {
	Received atomic.Int64
	conn     *net.UDPConn
	done     chan struct{}
}

// Sink listens on a port of the host until the test ends.
func (h *Host) Sink(addr netip.Addr, port uint16) *Sink {
	h.t.Helper()
	s := &Sink{done: make(chan struct{})}
	h.must(h.Do(func() (err error) {
		s.conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, port)))
		if err != nil {
			return fmt.Errorf("listen: %w", err)
		}
		raw, err := s.conn.SyscallConn()
		if err != nil {
			return fmt.Errorf("socket: %w", err)
		}
		return raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) })
	}))
	h.t.Cleanup(func() { _ = s.conn.Close() })
	go func() {
		defer close(s.done)
		c, ms := batchesOf(s.conn, addr), messages(64)
		for {
			n, err := c.ReadBatch(ms, 0)
			if err != nil {
				return
			}
			s.Received.Add(int64(n))
		}
	}()
	return s
}

// Total ends the sink once nothing more has arrived for a while, and returns how much did.
func (s *Sink) Total() int64 {
	for last := int64(-1); last != s.Received.Load(); {
		last = s.Received.Load()
		quiet := make(chan struct{})
		silence(func() { close(quiet) })
		<-quiet
	}
	_ = s.conn.Close()
	<-s.done
	return s.Received.Load()
}

// Flood sends one datagram after the other, each from the next source port so that each is a new connection as long
// as conntrack forgets them within ten seconds at 6,000 a second, until stop is closed, at most perSecond. It returns
// how many were sent.
func (h *Host) Flood(to netip.AddrPort, perSecond int, stop <-chan struct{}) (sent int64, err error) {
	f := flood{to: to, ms: messages(udpHeader + len(payload))}
	if err := h.Do(func() (err error) { return f.open() }); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.raw.Close()) }()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for began := time.Now(); ; {
		select {
		case <-stop:
			return f.sent, nil
		case <-ticker.C:
		}
		for due := int64(time.Since(began).Seconds() * float64(perSecond)); f.sent < due && !stopped(stop); { // a slow machine never catches up
			err := f.send(int(min(due-f.sent, batch)))
			if errors.Is(err, unix.ENOBUFS) { // what was sent is still queued
				break
			}
			if err != nil {
				return f.sent, err
			}
		}
	}
}

const (
	udpHeader = 8
	payload   = "nftcni"
	firstPort = 1024
)

// flood is one raw socket that writes UDP headers itself (RFC 768).
type flood struct {
	to   netip.AddrPort
	raw  net.PacketConn
	conn batches
	ms   []ipv4.Message
	sent int64
}

func (f *flood) open() (err error) {
	network := "ip4:udp"
	if f.to.Addr().Is6() {
		network = "ip6:udp"
	}
	if f.raw, err = net.ListenPacket(network, ""); err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	if f.conn = batchesOf(f.raw, f.to.Addr()); f.to.Addr().Is6() { // without a checksum IPv6 drops it; IPv4 does not mind
		if err := f.conn.(*ipv6.PacketConn).SetChecksum(true, 6); err != nil {
			return errors.Join(fmt.Errorf("checksum: %w", err), f.raw.Close())
		}
	}
	for i := range f.ms {
		b := f.ms[i].Buffers[0]
		binary.BigEndian.PutUint16(b[2:], f.to.Port())
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
		copy(b[udpHeader:], payload)
		f.ms[i].Addr = &net.IPAddr{IP: f.to.Addr().AsSlice()}
	}
	return nil
}

// send sends n datagrams, at most batch.
func (f *flood) send(n int) error {
	for i := range n {
		port := firstPort + (f.sent+int64(i))%(1<<16-firstPort)
		binary.BigEndian.PutUint16(f.ms[i].Buffers[0], uint16(port))
	}
	for done := 0; done < n; {
		k, err := f.conn.WriteBatch(f.ms[done:n], 0)
		if err != nil {
			return fmt.Errorf("send: %w", err)
		}
		done, f.sent = done+k, f.sent+int64(k)
	}
	return nil
}

func stopped(stop <-chan struct{}) bool {
	select {
	case <-stop:
		return true
	default:
		return false
	}
}
