package main

import (
	"fmt"
	"net/netip"
	"os"
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
