package main

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// envRounds is how often TestKernelAgentKilled kills the agent; 30 is the proof.
const envRounds = "NFTCNI_ROUNDS"

// wentWrong is what an agent may never say of the table it finds or writes: that it is
// brought in line after an error is not good enough.
var wentWrong = regexp.MustCompile(`(?m)^.*(level=ERROR|file exists|panic:).*$`)

// TestKernelAgentKilled kills the agent at any instant while four workers attach and detach
// and policies change, and starts it again: it finds its way back at the first attempt,
// whatever it was in the middle of, and whether or not the one before got that far.
func TestKernelAgentKilled(t *testing.T) { inFreshNode(t, testAgentKilled) }

func testAgentKilled(t *testing.T) {
	rounds, err := strconv.Atoi(cmp.Or(os.Getenv(envRounds), "3"))
	if err != nil {
		t.Fatalf("%s: %v", envRounds, err)
	}
	n := newFirstNode(t)
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.attachServers()
	ctx, stop := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() { n.churn(ctx) })
	attached := make([]int, 4)
	for w := range attached {
		work.Go(func() { attached[w] = n.attachAndDetach(ctx, w) })
	}
	for round := range rounds {
		select {
		case <-time.After(time.Duration(rand.IntN(300)) * time.Millisecond):
		case <-t.Context().Done():
		}
		if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-n.agentEnd
		if round%2 == 1 {
			n.startAndKill()
		}
		if err := n.startAgent(t.Context()); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	stop()
	work.Wait()
	t.Logf("%d rounds, attached %v", rounds, attached)
	n.verify()
	log, err := os.ReadFile(n.path("agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range wentWrong.FindAll(log, 10) {
		t.Errorf("agent: %s", line)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// startAndKill starts an agent that does not live to be ready, or just so.
func (n *firstNode) startAndKill() {
	cmd := exec.CommandContext(n.t.Context(), n.path("bin/nftcni"), append([]string{"agent", "--config", n.path("agent.yaml")}, n.source...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		n.t.Error(err)
		return
	}
	select {
	case <-time.After(time.Duration(rand.IntN(300)) * time.Millisecond):
	case <-n.t.Context().Done():
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// attachAndDetach runs pods, two at a time, until ctx ends, and returns how many were attached. A call
// that fails because there is no agent is given up as a runtime does: with a DEL.
func (n *firstNode) attachAndDetach(ctx context.Context, worker int) (attached int) {
	var before *sandbox
	end := func(s *sandbox) {
		if s == nil {
			return
		}
		if err := n.plugin.DelNetworkList(n.t.Context(), n.network, s.runtime); err != nil {
			n.t.Errorf("DEL: %v", err)
		}
		s.close()
	}
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("pod-%d%011d", worker, i%5)
		s, err := newSandbox(name)
		if err != nil {
			n.t.Error(err)
			return attached
		}
		s.runtime.ContainerID += fmt.Sprintf("-%d", i)
		n.putPod(name, []string{"starter", "stranger", "guarded"}[i%3])
		if _, err := n.plugin.AddNetworkList(n.t.Context(), n.network, s.runtime); err == nil {
			attached++
		}
		end(before)
		before = s
		if i%2 == 0 {
			n.api.remove("pods", "shop", name)
		}
	}
	end(before)
	return attached
}

// verify compares the kernel's table with the evaluator.
func (n *firstNode) verify() {
	n.t.Helper()
	out, err := exec.CommandContext(n.t.Context(), n.path("bin/nftcni"), "debug", "--state-dir", n.path("state"), "verify").CombinedOutput()
	if err != nil {
		n.t.Errorf("verify: %v\n%s", err, out)
	}
}
