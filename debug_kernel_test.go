package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// answer is what one run of the command line said.
type answer struct {
	stdout, stderr string
	status         int
}

// debug runs `nftcni debug` on the node as a person would.
func (n *redisNode) debug(t *testing.T, args ...string) answer {
	t.Helper()
	a := n.debugQuietly(t, args...)
	t.Logf("$ nftcni debug %s    # %d\n%s%s", strings.Join(args, " "), a.status, a.stdout, a.stderr)
	return a
}

// debugQuietly is debug for what is asked many times.
func (n *redisNode) debugQuietly(t *testing.T, args ...string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.path("bin/nftcni"), append([]string{"debug", "--state-dir", n.path("state")}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("debug %v: %v", args, err)
	}
	return answer{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// want checks the exit status and that every text is in the output.
func (a answer) want(t *testing.T, status int, texts ...string) {
	t.Helper()
	if a.status != status {
		t.Errorf("exit status %d, want %d\n%s%s", a.status, status, a.stdout, a.stderr)
	}
	for _, text := range texts {
		if !strings.Contains(a.stdout+a.stderr, text) {
			t.Errorf("output lacks %q:\n%s%s", text, a.stdout, a.stderr)
		}
	}
}

func (n *redisNode) ask(t *testing.T, src, dst *endpoint, allowed bool) {
	t.Helper()
	pair := src.families(dst)[0]
	p := &probe{src: src, dst: dst, from: pair[0], to: pair[1], service: service{policy.TCP, 6379}}
	if err := askAll(t.Context(), []*probe{p}, func(*probe) bool { return allowed }); err != nil {
		t.Fatal(err)
	}
	if p.answered != allowed {
		t.Fatalf("%s: %s", p, verdict(p.answered))
	}
}

// until runs a command again until its output has a text: what the kernel reports of
// packets comes after them.
func (n *redisNode) until(t *testing.T, text string, args ...string) answer {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		a := n.debugQuietly(t, args...)
		if strings.Contains(a.stdout, text) {
			return a
		}
		if time.Now().After(deadline) {
			t.Fatalf("debug %v never said %q:\n%s%s", args, text, a.stdout, a.stderr)
		}
	}
}

// TestKernelDebug asks every question on a node with real pods and packets.
func TestKernelDebug(t *testing.T) { inFreshNode(t, testDebug) }

func testDebug(t *testing.T) {
	n := newRedisNode(t, false)
	n.ask(t, n.nodejs, n.redis, true)
	n.ask(t, n.php, n.redis, false)
	n.debug(t, "status").want(t, 0, "ready", "yes", "redis", "event to kernel")
	n.debug(t, "pods").want(t, 0, "shop", "nodejs", "service=redis")
	n.debug(t, "policies").want(t, 0, "redis", "ingress", "1 in, 0 out")
	n.debug(t, "ipam").want(t, 0, "shop/redis", "10.244.")
	n.debug(t, "why", "nodejs", "shop/redis", "TCP/6379").want(t, 0, "ALLOWED", "rule 0 of shop/redis", "allow by access_port", "interface")
	n.debug(t, "why", "php", "redis", "TCP/6379", "--all").want(t, 0, "DENIED", "isolated by shop/redis",
		"it wants service=nodejs, and shop/php has service=php", "deny by access_rest")
	n.debug(t, "why", "nodejs", "redis", "TCP/80").want(t, 0, "it is for TCP/6379, UDP/6379, not TCP/80")
	n.debug(t, "why", "nobody", "redis", "TCP/80").want(t, 1, "nobody", "debug pods")
	n.until(t, "denied", "flows")
	n.debug(t, "flows", "--allowed", "--pod", "redis").want(t, 0, "shop/nodejs", "shop/redis rule 0")
	n.debug(t, "flows", "--denied", "-o", "json").want(t, 0, `"srcPod": "shop/php"`, `"policy": "shop/redis"`)
	n.debug(t, "drops").want(t, 0, "shop/php", "shop/redis", "ingress")
	n.debug(t, "verify").want(t, 0, "equal to a compilation from scratch", "0 decided otherwise")
	n.debug(t, "wait", "policy", "shop/redis").want(t, 0, "is in force since")
	n.debug(t, "wait", "policy", "shop/nothing", "--timeout", "100ms").want(t, 1, "the agent knows no such policy")
	n.debug(t, "matrix").want(t, 0, "shop/nodejs", "TCP/6379, UDP/6379")
	n.debug(t, "graph").want(t, 0, "<svg")
	n.debug(t, "doctor", "--cni-conf-dir", n.path("none")).want(t, 0, "forwarding", "table")
	n.debug(t, "bundle", "--to", n.path("bundle.tar.gz")).want(t, 0, "bundle.tar.gz")
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// TestKernelDebugDisagree corrupts one element by hand: debug why and verify must say so.
func TestKernelDebugDisagree(t *testing.T) { inFreshNode(t, testDebugDisagree) }

func testDebugDisagree(t *testing.T) {
	n := newRedisNode(t, false)
	n.awaitSnapshot(t)
	if err := unix.Kill(n.agentPID, unix.SIGKILL); err != nil { // or it would mend the table at once
		t.Fatal(err)
	}
	<-n.agentEnd
	n.debug(t, "why", "php", "redis", "TCP/6379").want(t, 0, "DENIED", "the agent does not answer")
	php, nodejs := n.php.addrs[0].String(), n.nodejs.addrs[0].String()
	out, err := exec.CommandContext(t.Context(), "nft", "list", "map", "inet", "nftcni", "pod_id4").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("nft is not installed: this test changes an element by hand")
	}
	_, rest, found := strings.Cut(string(out), nodejs)
	_, rest, colon := strings.Cut(rest, " : ")
	if !found || !colon {
		t.Fatalf("pod_id4 does not hold %s:\n%s", nodejs, out)
	}
	value := strings.TrimRight(strings.Fields(rest)[0], ",")
	cmd := exec.CommandContext(t.Context(), "nft", fmt.Sprintf("add element inet nftcni pod_id4 { %s : %s }", php, value))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	n.debug(t, "why", "php", "redis", "TCP/6379").want(t, 2, "DISAGREES", "oracle and kernel disagree")
	n.debug(t, "verify", "--flows", "4000", "--seed", "7").want(t, 2, "shop/php -> shop/redis")
}

// awaitSnapshot waits until the agent's snapshot file holds every pod.
func (n *redisNode) awaitSnapshot(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); <-tick.C {
		b, _ := os.ReadFile(filepath.Join(cni.DefaultRunDir, agent.SnapshotName)) // it may not be there yet
		whole := true
		for _, e := range []*endpoint{n.redis, n.nodejs, n.php} {
			whole = whole && bytes.Contains(b, []byte(`"`+e.addrs[0].String()+`"`))
		}
		if whole {
			return
		}
	}
	t.Fatal("the agent did not write its pods to the snapshot file")
}

// TestKernelDebugImpact: a live connection that a change would cut is named, the exit
// status is 3, and nothing happens to it.
func TestKernelDebugImpact(t *testing.T) { inFreshNode(t, testDebugImpact) }

func testDebugImpact(t *testing.T) {
	n := newRedisNode(t, false)
	var live net.Conn
	err := inNetNS(n.nodejs.netns, func() (err error) {
		live, err = net.Dial("tcp", netip.AddrPortFrom(n.nodejs.families(n.redis)[0][1], 6379).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	tight := filepath.Join(n.dir, "tight.yaml")
	if err := os.WriteFile(tight, []byte(strings.Replace(redisPolicy, "service: nodejs", "service: none", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	n.debug(t, "impact", "-f", tight, "--ops").want(t, 3, "shop/nodejs", "TCP/6379", "access", "1 live connection would be cut")
	n.ask(t, n.nodejs, n.redis, true) // nothing was applied
	n.debug(t, "impact", "--delete", "policy/shop/redis").want(t, 0, "Live connections that would be cut: 0", "all")
	n.debug(t, "impact", "--delete", "policy/shop/none").want(t, 1, "there is no policy shop/none")
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// trace runs debug trace for one packet that f makes.
func (n *redisNode) trace(t *testing.T, f func(), args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), n.path("bin/nftcni"), append([]string{"debug", "trace", "--packets", "1", "--seconds", "20"}, args...)...)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stderr.Read(make([]byte, 256)); err != nil { // it says when it traces
		t.Fatal(err)
	}
	f()
	rest, _ := io.ReadAll(stderr) // what there is of it
	if err := cmd.Wait(); err != nil {
		t.Fatalf("trace: %v: %s", err, rest)
	}
	t.Logf("$ nftcni debug trace %s\n%s", strings.Join(args, " "), stdout.String())
	return stdout.String()
}

// TestKernelDebugTrace follows a denied and an allowed packet, and one that a foreign
// table drops.
func TestKernelDebugTrace(t *testing.T) { inFreshNode(t, testDebugTrace) }

func testDebugTrace(t *testing.T) {
	n := newRedisNode(t, false)
	out := n.trace(t, func() { n.ask(t, n.php, n.redis, false) }, "--from", "php", "--to", "redis")
	for _, want := range []string{"shop/php -> shop/redis TCP/6379", "inet nftcni", "deny", "isolated by shop/redis", "it wants service=nodejs"} {
		if !strings.Contains(out, want) {
			t.Errorf("trace of a denied packet lacks %q", want)
		}
	}
	out = n.trace(t, func() { n.ask(t, n.nodejs, n.redis, true) }, "--from", "nodejs")
	if !strings.Contains(out, "rule 0 of shop/redis") {
		t.Errorf("trace of an allowed packet does not name its rule")
	}
	cmd := exec.CommandContext(t.Context(), "nft", "table ip firewall { chain guard { type filter hook forward priority 10; tcp dport 6379 drop; }; }")
	if text, err := cmd.CombinedOutput(); errors.Is(err, exec.ErrNotFound) {
		t.Skip("nft is not installed: this test makes a foreign table")
	} else if err != nil {
		t.Fatalf("nft: %v: %s", err, text)
	}
	// Both kinds of flows are denied now; a new connection of nodejs is what policy allows.
	out = n.trace(t, func() { n.ask(t, n.nodejs, n.redis, false) }, "--from", "nodejs")
	if !strings.Contains(out, "ip firewall") || !strings.Contains(out, "NOT OURS") {
		t.Error("the foreign drop is not named")
	}
	n.killTrace(t)
}

// killTrace ends a trace with SIGKILL: the kernel must remove its table.
func (n *redisNode) killTrace(t *testing.T) {
	t.Helper()
	tables := func() string {
		out, err := exec.CommandContext(t.Context(), "nft", "list", "tables").Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	cmd := exec.CommandContext(t.Context(), n.path("bin/nftcni"), "debug", "trace", "--from", "php")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stderr.Read(make([]byte, 256)); err != nil { // it says when it traces
		t.Fatal(err)
	}
	if !strings.Contains(tables(), nft.TraceTable) {
		t.Errorf("while tracing there is no table %s", nft.TraceTable)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if strings.Contains(tables(), nft.TraceTable) {
		t.Errorf("after SIGKILL the table %s is left", nft.TraceTable)
	}
}

// TestKernelDebugCapture reads the packets of one connection as pcap.
func TestKernelDebugCapture(t *testing.T) { inFreshNode(t, testDebugCapture) }

func testDebugCapture(t *testing.T) {
	n := newRedisNode(t, false)
	cmd := exec.CommandContext(t.Context(), n.path("bin/nftcni"), "debug", "capture", "redis", "--count", "3", "--seconds", "20")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	header := make([]byte, 24)
	if _, err := io.ReadFull(stdout, header); err != nil { // the socket is bound when it comes
		t.Fatal(err)
	}
	n.ask(t, n.nodejs, n.redis, true)
	packets, err := io.ReadAll(stdout)
	if err != nil || cmd.Wait() != nil {
		t.Fatal(err)
	}
	found, all := 0, 0
	for ; len(packets) >= 16; all++ {
		size := int(binary.LittleEndian.Uint32(packets[8:]))
		if len(packets) < 16+size {
			t.Fatalf("a packet of %d bytes is cut short", size)
		}
		if server := n.nodejs.families(n.redis)[0][1].As4(); bytes.Contains(packets[16:16+size], server[:]) {
			found++
		}
		packets = packets[16+size:]
	}
	if !bytes.Equal(header[:4], []byte{0x4d, 0x3c, 0xb2, 0xa1}) || header[20] != 1 || found == 0 || all != 3 { // what IPv6 says by itself may be among them
		t.Errorf("header % x, %d packets, %d of redis, want pcap with nanoseconds, Ethernet, 3 packets", header, all, found)
	}
	n.debug(t, "capture", "nobody").want(t, 1, "nobody", "debug pods")
}

// TestKernelDebugFollow follows flows while they happen.
func TestKernelDebugFollow(t *testing.T) { inFreshNode(t, testDebugFollow) }

func testDebugFollow(t *testing.T) {
	n := newRedisNode(t, false)
	cmd := exec.CommandContext(t.Context(), n.path("bin/nftcni"), "debug", "flows", "-f", "-o", "json")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.ask(t, n.nodejs, n.redis, true)
	n.ask(t, n.php, n.redis, false)
	seen := map[string]bool{}
	for lines := bufio.NewScanner(stdout); !(seen["shop/nodejs allowed"] && seen["shop/php denied"]) && lines.Scan(); {
		var f agent.Flow
		if err := json.Unmarshal(lines.Bytes(), &f); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		seen[f.SrcPod+" "+f.Verdict] = true
	}
	if len(seen) != 2 {
		t.Errorf("seen %v, want nodejs allowed and php denied", seen)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after an interrupt: %v", err)
	}
}

// TestKernelMetrics scrapes a running agent.
func TestKernelMetrics(t *testing.T) { inFreshNode(t, testMetrics) }

func testMetrics(t *testing.T) {
	n := newRedisNode(t, false)
	if err := n.close(); err != nil {
		t.Fatal(err)
	}
	n.settings = "metrics: 127.0.0.1:9100\nflowLog: /run/flows.json\n"
	if err := n.startAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.ask(t, n.php, n.redis, false)
	scrape(t, "/healthz")
	scrape(t, "/readyz")
	out := scrape(t, "/metrics")
	for _, want := range []string{"nftcni_ready 1", `nftcni_elements{set="pod_id4"}`, "nftcni_event_to_kernel_seconds_bucket",
		`nftcni_denied_packets_total{direction="ingress",policies="shop/redis"}`, "nftcni_build_info", "nftcni_table_unreadable 0"} {
		if !strings.Contains(out, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	checkConventions(t, out)
	if err := n.close(); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile("/run/flows.json")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range bytes.Lines(b) {
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		var f agent.Flow
		if err := d.Decode(&f); err != nil || f.Seq == 0 || f.At.IsZero() || !f.Src.IsValid() || !f.Dst.IsValid() || f.Protocol == "" {
			t.Errorf("flow log: %v in %q", err, line)
		}
		seen[f.Verdict+" "+f.SrcPod+" "+f.Policy] = true
	}
	if !seen["denied shop/php shop/redis"] {
		t.Errorf("the flow log lacks the denial:\n%s", b)
	}
}

// checkConventions holds the metrics to those of Prometheus: names, units, help, and that the
// dashboard and the alert rules ask for none but these.
func checkConventions(t *testing.T, metrics string) {
	t.Helper()
	problems, err := promlint.New(strings.NewReader(metrics)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "nftcni_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	name := regexp.MustCompile(`\bnftcni_[a-z_]+`)
	for _, file := range []string{"deploy/grafana-dashboard.json", "deploy/alerts.yaml"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllString(string(b), -1) {
			if !strings.Contains(metrics, "\n"+m+"{") && !strings.Contains(metrics, "\n"+m+" ") {
				t.Errorf("%s asks for %s, which a scrape does not have", file, m)
			}
		}
	}
}

func scrape(t *testing.T, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:9100"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Errorf("%s: %s %v: %s", path, resp.Status, err, b)
	}
	return string(b)
}
