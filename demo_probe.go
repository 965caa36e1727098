package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// service is a protocol and, where the protocol has one, a port.
type service struct {
	protocol policy.Protocol
	port     uint16
}

// echo is the service of an ICMP or ICMPv6 echo request, whichever fits the addresses.
var echo = service{protocol: policy.ICMP}

func (s service) String() string {
	switch s.protocol {
	case policy.TCP:
		return "tcp/" + strconv.Itoa(int(s.port))
	case policy.UDP:
		return "udp/" + strconv.Itoa(int(s.port))
	case policy.SCTP:
		return "sctp/" + strconv.Itoa(int(s.port))
	}
	return "icmp"
}

// endpoint is one end of probes: a network namespace and the addresses it has there,
// at most one per family. Several endpoints may share a namespace.
type endpoint struct {
	name  string
	netns int // file descriptor
	addrs []netip.Addr
}

// families lists the pairs of addresses over which e can reach to.
func (e *endpoint) families(to *endpoint) [][2]netip.Addr {
	var pairs [][2]netip.Addr
	for _, a := range e.addrs {
		for _, b := range to.addrs {
			if a.Is4() == b.Is4() {
				pairs = append(pairs, [2]netip.Addr{a, b})
			}
		}
	}
	return pairs
}

// probe asks whether src may open a connection to a service of dst.
type probe struct {
	src, dst *endpoint
	from, to netip.Addr
	service  service
	answered bool // the outcome
}

func (p *probe) String() string {
	return fmt.Sprintf("%s (%s) -> %s (%s) %s", p.src.name, p.from, p.dst.name, p.to, p.service)
}

// inNetNS runs f on a thread of its own inside a network namespace and waits for it.
// The thread is never unlocked, so the runtime ends it with the goroutine: no thread
// that is left in a foreign namespace can serve anybody else.
func inNetNS(fd int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// serve answers every service on every address of e with e's name until ctx ends.
// Echo requests need no server: the kernel answers them.
func serve(ctx context.Context, e *endpoint, services []service) error {
	return inNetNS(e.netns, func() error {
		for _, s := range services {
			for _, a := range e.addrs {
				if err := serveOn(ctx, e.name, netip.AddrPortFrom(a, s.port), s.protocol); err != nil {
					return fmt.Errorf("serve %s of %s: %w", s, e.name, err)
				}
			}
		}
		return nil
	})
}

func serveOn(ctx context.Context, name string, at netip.AddrPort, protocol policy.Protocol) error {
	switch protocol {
	case policy.TCP:
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { l.Close() })
		go serveStream(l, name)
	case policy.UDP:
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { c.Close() })
		go serveDatagrams(c, name)
	case policy.SCTP:
		return listenSCTP(ctx, name, at)
	}
	return nil
}

// servedFor bounds how long a connection stays whose client does not close it.
const servedFor = 10 * time.Minute

// serveStream sends the name to whoever connects, and leaves the end to the client: a
// connection that a client keeps is alive on both sides.
func serveStream(l *net.TCPListener, name string) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		go func() {
			// A peer that is gone already has had its answer or never wanted it.
			_, _ = c.Write([]byte(name))
			_ = c.SetReadDeadline(time.Now().Add(servedFor))
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}()
	}
}

func serveDatagrams(c *net.UDPConn, name string) {
	buf := make([]byte, 64)
	for {
		_, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an earlier reply
		}
		_, _ = c.WriteToUDPAddrPort([]byte(name), from)
	}
}

// listenSCTP serves one-to-one SCTP sockets, which package net does not know.
func listenSCTP(ctx context.Context, name string, at netip.AddrPort) error {
	fd, err := unix.Socket(familyOf(at.Addr()), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_SCTP)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(at)); err != nil {
		unix.Close(fd)
		return err
	}
	if err := unix.Listen(fd, 64); err != nil {
		unix.Close(fd)
		return err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		for {
			err := raw.Read(func(fd uintptr) bool {
				c, _, err := unix.Accept4(int(fd), unix.SOCK_CLOEXEC)
				if err != nil {
					return !errors.Is(err, unix.EAGAIN)
				}
				_, _ = unix.Write(c, []byte(name))
				unix.Close(c)
				return true
			})
			if err != nil {
				return
			}
		}
	}()
	return nil
}

// prober sends probes. The zero value is not usable: take newProber.
type prober struct {
	// Quiet is how long no answer may come before what is unanswered counts as
	// denied. It starts again with every answer, so that a busy machine gets the time
	// it needs, up to Limit in all.
	quiet, limit time.Duration
	batch        int // sockets open at once per source
}

// newProber makes a prober for about sources sources at once. The sockets it keeps
// open stay within half of the process's file descriptors.
func newProber(sources int, quiet time.Duration) prober {
	files := unix.Rlimit{Cur: 1024}
	_ = unix.Getrlimit(unix.RLIMIT_NOFILE, &files) // else POSIX's least
	return prober{
		quiet: quiet, limit: 8 * quiet,
		batch: min(max(int(files.Cur)/2/max(sources, 1), 8), 256),
	}
}

// askAll sends the probes. A silent probe that should have been answered is asked once
// more with all the time it may want, so that nothing but policy can make it differ.
func askAll(ctx context.Context, probes []*probe, expected func(*probe) bool) error {
	const quiet = 250 * time.Millisecond
	sources := make(map[*endpoint]bool)
	for _, p := range probes {
		sources[p.src] = true
	}
	if err := newProber(len(sources), quiet).run(ctx, probes); err != nil {
		return err
	}
	var silent []*probe
	for _, p := range probes {
		if !p.answered && expected(p) {
			silent = append(silent, p)
		}
	}
	return newProber(len(sources), 16*quiet).run(ctx, silent)
}

// run sends the probes, all sources at once, and notes which were answered. An error
// is what no policy can cause: a refused connection, an answer of somebody else, no
// route, no socket.
func (pr prober) run(ctx context.Context, probes []*probe) error {
	bySource := make(map[*endpoint][]*probe)
	for _, p := range probes {
		bySource[p.src] = append(bySource[p.src], p)
	}
	errs := make([]error, 0, len(bySource))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for src, ps := range bySource {
		wg.Go(func() {
			err := inNetNS(src.netns, func() error { return pr.fromHere(ctx, ps) })
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// fromHere sends the probes of one source from the calling thread's namespace.
func (pr prober) fromHere(ctx context.Context, probes []*probe) error {
	var errs []error
	for len(probes) > 0 && ctx.Err() == nil {
		n := min(pr.batch, len(probes))
		errs = append(errs, pr.sendBatch(ctx, probes[:n]))
		probes = probes[n:]
	}
	return errors.Join(append(errs, ctx.Err())...)
}

func (pr prober) sendBatch(ctx context.Context, probes []*probe) error {
	var errs []error
	open := make([]*probeSocket, 0, len(probes))
	defer func() {
		for _, s := range open {
			s.close()
		}
	}()
	for i, p := range probes {
		s := &probeSocket{probe: p, fd: -1, id: uint16(i)}
		if err := s.open(); err != nil {
			errs = append(errs, fmt.Errorf("probe %s: %w", p, err))
			s.close()
			continue
		}
		open = append(open, s)
	}
	return errors.Join(append(errs, pr.await(ctx, open)...)...)
}

// await polls until every socket has its answer or nothing came for the quiet time.
// Datagrams are sent once more at half of it: one may be lost without any policy.
func (pr prober) await(ctx context.Context, sockets []*probeSocket) []error {
	var errs []error
	start := time.Now()
	last, again := start, false
	fds := make([]unix.PollFd, 0, len(sockets))
	for ctx.Err() == nil {
		now := time.Now()
		if now.Sub(last) >= pr.quiet || now.Sub(start) >= pr.limit {
			return errs
		}
		if !again && now.Sub(last) >= pr.quiet/2 {
			again = true
			for _, s := range sockets {
				s.sendAgain()
			}
		}
		fds = fds[:0]
		for _, s := range sockets {
			if !s.done {
				fds = append(fds, unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN})
			}
		}
		if len(fds) == 0 {
			return errs
		}
		n, err := unix.Poll(fds, int(pr.quiet.Milliseconds()/8)+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return append(errs, fmt.Errorf("poll: %w", err))
		}
		if n <= 0 {
			continue
		}
		if answers := readAnswers(sockets, fds, &errs); answers > 0 {
			last = time.Now()
		}
	}
	return errs
}

// readAnswers reads the sockets that poll reported and returns how many are done.
func readAnswers(sockets []*probeSocket, fds []unix.PollFd, errs *[]error) int {
	answers, i := 0, 0
	for _, s := range sockets {
		if s.done {
			continue
		}
		ready := fds[i].Revents != 0
		i++
		if !ready {
			continue
		}
		if err := s.read(); err != nil {
			*errs = append(*errs, fmt.Errorf("probe %s: %w", s.probe, err))
		}
		if s.done {
			answers++
		}
	}
	return answers
}
