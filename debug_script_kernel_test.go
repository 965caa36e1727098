package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

var update = flag.Bool("update", false, "rewrite the golden output in testdata/debug")

// TestKernelDebugScripts runs the scripts of testdata/debug, each on a node of its own
// with the pods redis, nodejs and php (newRedisNode): what every debug command prints there,
// its exit status, and what it says on standard error. testdata/debug/README.md has the
// commands and what is volatile. -update rewrites the golden output.
func TestKernelDebugScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/debug/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts (%v)", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			inFreshNode(t, func(t *testing.T) { runNodeScript(t, file) })
		})
	}
}

func runNodeScript(t *testing.T, file string) {
	// A new network namespace gets IPv4's settings from the host (net.core.devconf_inherit_init_net).
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	s := &nodeScript{t: t, n: newRedisNode(t, false)}
	testscript.Run(t, testscript.Params{
		Files: []string{file}, UpdateScripts: *update, RequireUniqueNames: true, ContinueOnError: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nftcni": s.nftcni, "during": s.during, "connect": s.connect, "live": s.live,
			"flows-listed": s.flowsListed, "snapshot-written": func(*testscript.TestScript, bool, []string) { s.n.awaitSnapshot(t) },
			"kill-agent": s.killAgent, "paths-probed": s.pathsProbed,
		},
	})
}

// nodeScript is the commands that a script has beside those of testscript.
type nodeScript struct {
	t *testing.T
	n *redisNode
}

// nftcni runs "nftcni STATUS ARGUMENTS...": the exit status must be STATUS, and what it
// printed is in the file out, standard error behind "2> ".
func (s *nodeScript) nftcni(ts *testscript.TestScript, _ bool, args []string) {
	var stdout, stderr bytes.Buffer
	cmd := s.command(ts, args)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v: %v", args, err)
	}
	s.ended(ts, cmd, args, stdout.String(), stderr.String())
}

func (s *nodeScript) command(ts *testscript.TestScript, args []string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	s.t.Cleanup(cancel)
	if len(args) < 2 {
		ts.Fatalf("want STATUS ARGUMENTS...")
	}
	more := slices.Clone(args[1:])
	if more[0] == "debug" {
		more = slices.Insert(more, 1, "--state-dir", s.n.path("state"))
	}
	if i := slices.Index(more, "doctor"); i >= 0 && more[0] == "debug" { // never the host's own
		more = slices.Insert(more, i+1, "--cni-conf-dir", "net.d")
	}
	cmd := exec.CommandContext(ctx, s.n.path("bin/nftcni"), more...)
	cmd.Dir = ts.Getenv("WORK")
	return cmd
}

// ended writes the file out and checks the status, and that what -o json prints is JSON.
func (s *nodeScript) ended(ts *testscript.TestScript, cmd *exec.Cmd, args []string, stdout, stderr string) {
	ts.Logf("$ nftcni %s    # %d\n%s%s", strings.Join(args[1:], " "), cmd.ProcessState.ExitCode(), stdout, stderr)
	if got := strconv.Itoa(cmd.ProcessState.ExitCode()); got != args[0] {
		ts.Fatalf("nftcni %v: exit status %s, want %s", args[1:], got, args[0])
	}
	if i := slices.Index(args, "-o"); i > 0 && args[i+1] == "json" {
		for d := json.NewDecoder(strings.NewReader(stdout)); ; {
			var v any
			if err := d.Decode(&v); err == io.EOF {
				break
			} else if err != nil {
				ts.Fatalf("-o json prints what is no JSON: %v", err)
			}
		}
	}
	var text strings.Builder
	text.WriteString(stdout)
	for line := range strings.Lines(stderr) {
		text.WriteString("2> " + line)
	}
	ts.Check(writeRenamed(ts.MkAbs("out"), []byte(stable(text.String()))))
}

// during runs "during SRC DST allowed|denied STATUS ARGUMENTS...": the connection is tried
// as soon as the command says on standard error that it is ready.
func (s *nodeScript) during(ts *testscript.TestScript, _ bool, args []string) {
	var stdout bytes.Buffer
	cmd := s.command(ts, args[3:])
	cmd.Stdout = &stdout
	stderr, err := cmd.StderrPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	said := bufio.NewReader(stderr)
	before := ""
	for !strings.Contains(before, "try the connection now") {
		line, err := said.ReadString('\n')
		ts.Check(err)
		before += line
	}
	s.connect(ts, false, args[:3])
	rest, err := io.ReadAll(said)
	ts.Check(err)
	_ = cmd.Wait() // the status says how it ended
	s.ended(ts, cmd, args[3:], stdout.String(), before+string(rest))
}

// connect tries one TCP connection to port 6379 over IPv4.
func (s *nodeScript) connect(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 3 {
		ts.Fatalf("want SRC DST allowed|denied")
	}
	src, dst := s.pod(ts, args[0]), s.pod(ts, args[1])
	pair := src.families(dst)[0]
	p := &probe{src: src, dst: dst, from: pair[0], to: pair[1], service: service{policy.TCP, 6379}}
	ts.Check(askAll(s.t.Context(), []*probe{p}, func(*probe) bool { return args[2] == "allowed" }))
	if got := verdict(p.answered); got != args[2] {
		ts.Fatalf("%s: %s, want %s", p, got, args[2])
	}
}

// live opens such a connection and leaves it open until the script ends.
func (s *nodeScript) live(ts *testscript.TestScript, _ bool, args []string) {
	src, dst := s.pod(ts, args[0]), s.pod(ts, args[1])
	ts.Check(inNetNS(src.netns, func() error {
		c, err := net.Dial("tcp", netip.AddrPortFrom(src.families(dst)[0][1], 6379).String())
		if err == nil {
			ts.Defer(func() { _ = c.Close() })
		}
		return err
	}))
}

func (s *nodeScript) pod(ts *testscript.TestScript, name string) *endpoint {
	e := map[string]*endpoint{"redis": s.n.redis, "nodejs": s.n.nodejs, "php": s.n.php}[name]
	if e == nil {
		ts.Fatalf("no pod is called %s", name)
	}
	return e
}

// flowsListed waits until the agent lists so many connections: the kernel tells it of a
// packet after the packet.
func (s *nodeScript) flowsListed(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	ts.Check(s.n.demoNode.until(s.t.Context(), func(ctx context.Context) bool {
		var got agent.Flows
		return s.n.agent.Get(ctx, agent.PathFlows, &got) == nil && len(got.Flows) >= want
	}))
}

// pathsProbed waits until every path to another node has answered: the agent asks in the
// background, and again when nobody answered in time.
func (s *nodeScript) pathsProbed(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(s.n.demoNode.until(s.t.Context(), func(ctx context.Context) bool {
		var got agent.MeshStatus
		answered := 0
		if s.n.agent.Get(ctx, agent.PathMesh, &got) == nil {
			for _, p := range got.Probes {
				answered += min(p.Carries, 1)
			}
		}
		return answered > 0 && answered == len(got.Report.ProbeTargets())
	}))
}

func (s *nodeScript) killAgent(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(unix.Kill(s.n.agentPID, unix.SIGKILL))
	<-s.n.agentEnd
}

// volatile is what differs between two runs, and what stands for it in the golden output:
// of the same width in a table, so that its columns stay. testdata/debug/README.md lists it for people.
var volatile = []struct {
	*regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)`), "2006-01-02T15:04:05Z"},
	{regexp.MustCompile(`\b\d\d:\d\d:\d\d\b(\.\d{3}\b)?`), "15:04:05$1"},
	{regexp.MustCompile(`\b15:04:05\.\d{3}\b`), "15:04:05.000"},
	{regexp.MustCompile(`\b([0-9a-f]{2}:){5}[0-9a-f]{2}\b`), "00:00:5e:00:53:01"},
	{regexp.MustCompile(`\b\d+ (us|ms)\b`), "N $1"},
	{regexp.MustCompile(`\b[0-9hm.µ]+s( ago\b| old\b)`), "AGE$1"},
	{regexp.MustCompile(`\bends in [0-9hm.]+s\b`), "ends in AGE"},
	{regexp.MustCompile(`\bmark 0x[0-9a-f]+`), "mark MARK"},
	{regexp.MustCompile(`\bpacket [0-9a-f]{6,8}\b`), "packet ID"},
	{regexp.MustCompile(`(\bfrom port |shop/\w+ +|(?:10\.244\.0\.\d+|\[fd00:10:244::\w+\]):)\d{5}\b`), "${1}40000"},
	{regexp.MustCompile(`\bhandle \d+`), "handle N"},
	{regexp.MustCompile(`inet nftcni, \d+ elements`), "inet nftcni, N elements"},
	{regexp.MustCompile(`\bseed \d+`), "seed N"},
	{regexp.MustCompile(`\b\d+ probed\b`), "N probed"},
	{regexp.MustCompile(`\b([1-9]\d*|\d+ of \d+ flows) decided otherwise`), "N decided otherwise"},
	{regexp.MustCompile(`\bkernel generation \d+`), "kernel generation N"},
	{regexp.MustCompile(`(ready, generation |(?m:^generation +))\d+`), "${1}N"}, // nf_tables', policies' are 1 here
	{regexp.MustCompile(`\d+ elements? in \d+ transactions?, N us`), "N elements in N transactions, N us"},
	{regexp.MustCompile(`\d+ changes?, half within (more than )?[0-9.]+[mµ]?s, 99% within (more than )?[0-9.]+[mµ]?s +\|.*\|`), "N changes, half within AGE, 99% within AGE  |BARS|"},
	{regexp.MustCompile(`("?\b(packet|seq|micros|kernelMicros|seed|millis|flows|clientPort|mark|expires\w*|timeout\w*|kernelGeneration|commits|sumMicros|transactions|elements|events)"?: ?)("[0-9a-f]+"|'[0-9a-f]+'|[0-9a-fx.]+)`), "${1}N"},
	{regexp.MustCompile(`(wrongCount"?: )[1-9]\d*`), "${1}N"},
	{regexp.MustCompile(`("?generation"?: )([2-9]|\d\d+)\b`), "${1}N"},
	{regexp.MustCompile(`(?s)("counts"|"recent"): \[.*?\n  (  )?\]`), "$1: []"},
	{regexp.MustCompile(`(?m)^((?:  )?(?:counts|recent):)\n((?:  )?[ -] .*\n)*`), "$1 []\n"},
	{regexp.MustCompile(`/proc/\d+/fd/\d+`), "/proc/PID/fd/N"},
	{regexp.MustCompile(`(boot"?: "?)[0-9a-f-]{36}`), "${1}ID"},
	{regexp.MustCompile(`(?m)^(clock|kernel|conntrack) +(?:ok|warning|broken) .*\n(^ +remedy: .*\n)?`), ""},
}

// stable replaces what is volatile.
func stable(text string) string {
	for _, v := range volatile {
		text = v.ReplaceAllString(text, v.with)
	}
	return text
}
