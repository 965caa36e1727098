package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestKernelFlowsCost opens 10,000 connections a second: the agent must sample and say so.
// What watching costs is printed for people (docs/debug.md has a quiet machine's figure); a
// busy or emulated machine cannot tell whether it is below a twentieth of a core.
func TestKernelFlowsCost(t *testing.T) { inFreshNode(t, testFlowsCost) }

func testFlowsCost(t *testing.T) {
	n := newRedisNode(t, false)
	to := netip.AddrPortFrom(n.nodejs.families(n.redis)[0][1], 6379)
	var sent int
	var took, cpu time.Duration
	err := inNetNS(n.nodejs.netns, func() error {
		// A second for the sampler to find its rate, then five to measure.
		if _, err := openConnections(to, 10000, time.Second); err != nil {
			return err
		}
		before, began := agentCPU(t, n.agentPID), time.Now()
		var err error
		sent, err = openConnections(to, 10000, 5*time.Second)
		took, cpu = time.Since(began), agentCPU(t, n.agentPID)-before
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	rate, share := float64(sent)/took.Seconds(), cpu.Seconds()/took.Seconds()
	t.Logf("%.0f new connections a second for %v cost the agent %v of CPU: %.1f%% of a core", rate, took.Round(time.Millisecond), cpu, 100*share)
	if rate >= 2000 {
		n.debug(t, "flows", "--last", "1").want(t, 0, "too many new connections to list all")
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// openConnections sends one datagram from a new source port perSecond times a second.
func openConnections(to netip.AddrPort, perSecond int, long time.Duration) (sent int, err error) {
	began := time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for time.Since(began) < long {
		<-tick.C
		for due := int(time.Since(began).Seconds() * float64(perSecond)); sent < due && time.Since(began) < long; sent++ {
			if err := oneDatagram(to); err != nil {
				return sent, err
			}
		}
	}
	return sent, nil
}

func oneDatagram(to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(to)); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// agentCPU is the processor time of a process so far (proc(5), stat: utime and stime in
// hundredths of a second).
func agentCPU(t *testing.T, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	fields := strings.Fields(rest)
	var ticks int
	for _, f := range fields[11:13] {
		v, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		ticks += v
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// TestKernelFlowsCut: a change of policy cuts a connection, and it is its server who sends the
// next packet. The denial that is listed is the connection's, not that packet's; and what
// was judged before the change says how such a connection is judged now.
func TestKernelFlowsCut(t *testing.T) { inFreshNode(t, testFlowsCut) }

func testFlowsCut(t *testing.T) {
	n := newRedisNode(t, false)
	pair := n.nodejs.families(n.redis)[0]
	server, client := udpIn(t, n.redis, netip.AddrPortFrom(pair[1], 6379), netip.AddrPort{}), udpIn(t, n.nodejs, netip.AddrPortFrom(pair[0], 40000), netip.AddrPortFrom(pair[1], 6379))
	if _, err := client.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	if err := server.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := server.ReadFromUDPAddrPort(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	n.until(t, "UDP/6379", "flows", "--allowed")
	only := func(policy string) {
		t.Helper()
		if _, err := n.change(t.Context(), func() error { return writeRenamed(n.manifests+"/policy.yaml", []byte(policy)) }); err != nil {
			t.Fatal(err)
		}
	}
	only(strings.ReplaceAll(redisPolicy, "UDP", "SCTP"))
	traced := n.trace(t, func() {
		if _, err := server.WriteToUDPAddrPort([]byte("!"), netip.AddrPortFrom(pair[0], 40000)); err != nil {
			t.Fatal(err)
		}
	}, "--from", "redis", "--packets", "1")
	if want := "denied: it answers shop/nodejs -> shop/redis UDP/6379; ingress: isolated by shop/redis; no rule matches"; !strings.Contains(traced, want) {
		t.Errorf("the trace lacks %q:\n%s", want, traced)
	}
	n.until(t, "denied", "flows", "--denied")
	flow := regexp.MustCompile(`(allowed|denied) +shop/nodejs +shop/redis +UDP/6379 +(.*)`)
	for _, step := range []struct{ policy, allowed, denied string }{
		{"", "now denied: shop/redis", "shop/redis"},
		{redisPolicy, "shop/redis rule 0", "now allowed: shop/redis rule 0"},
	} {
		if step.policy != "" {
			only(step.policy)
		}
		n.until(t, step.allowed+"\n", "flows") // the agent names flows by a cluster that is up to a second old
		got := map[string][]string{}
		for _, m := range flow.FindAllStringSubmatch(n.debug(t, "flows").stdout, -1) {
			got[m[1]] = append(got[m[1]], m[2])
		}
		if want := map[string][]string{"allowed": {step.allowed}, "denied": {step.denied}}; !reflect.DeepEqual(got, want) {
			t.Errorf("listed %q, want %q", got, want)
		}
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// udpIn is a socket of a pod, connected where to is valid.
func udpIn(t *testing.T, e *endpoint, from, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := inNetNS(e.netns, func() (err error) {
		if to.IsValid() {
			c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(to))
			return err
		}
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(from))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
