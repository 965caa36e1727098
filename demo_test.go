package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

func readDemo(t *testing.T, name string) []byte {
	t.Helper()
	data, err := demoFiles.ReadFile("testdata/demo/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestDemoMatrix compares the demo's hand-written expectations, before and after each
// change, with what the evaluator says of the same manifests.
func TestDemoMatrix(t *testing.T) {
	expected, err := parseMatrix(readDemo(t, "expected.txt"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := copyFiles(dir, "testdata/demo/manifests"); err != nil {
		t.Fatal(err)
	}
	compareMatrix(t, "manifests", expected, dir)
	for _, change := range []string{"1-policy", "2-label"} {
		title, changed, err := expected.change(readDemo(t, "changes/"+change+"/expected.txt"))
		if err != nil || title == "" {
			t.Fatalf("%s: title %q, error %v", change, title, err)
		}
		expected = changed
		if err := copyFiles(dir, "testdata/demo/changes/"+change); err != nil {
			t.Fatal(err)
		}
		compareMatrix(t, change, expected, dir)
	}
}

func compareMatrix(t *testing.T, step string, expected matrix, dir string) {
	t.Helper()
	cluster, problems, err := k8s.LoadDir(dir)
	if err != nil || len(problems) > 0 {
		t.Fatalf("%s: %v %v", step, problems, err)
	}
	ends := map[string]*endpoint{"node": {name: "node", addrs: addrsOf(nodePrefixes)}}
	for name, addrs := range outsideEnds() {
		ends[name] = &endpoint{name: name, addrs: addrs}
	}
	for i := range cluster.Pods {
		p := &cluster.Pods[i]
		p.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 0, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:10:244::%x", i+1))}
		ends[p.Name.String()] = &endpoint{name: p.Name.String(), addrs: p.Addrs}
	}
	inOrder := make([]*endpoint, len(expected.names))
	for i, name := range expected.names {
		if inOrder[i] = ends[name]; inOrder[i] == nil {
			t.Fatalf("%s: no pod or address is called %s; there are %v", step, name, slices.Sorted(maps.Keys(ends)))
		}
	}
	for _, p := range expected.probes(inOrder) {
		f := policy.Flow{Src: p.from, Dst: p.to, Protocol: p.service.protocol, Port: p.service.port}
		if f.Protocol == policy.ICMP {
			f.Port = icmpEchoRequest << 8
			if f.Dst.Is6() {
				f.Protocol, f.Port = policy.ICMPv6, icmpv6EchoRequest<<8
			}
		}
		if got, want := policy.Evaluate(cluster, "demo", f).Allowed, expected.expects(p); got != want {
			t.Errorf("%s: %s: the oracle says %s, the matrix %s", step, p, verdict(got), verdict(want))
		}
	}
}

func TestParseMatrix(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"row without heading", "a ++\n", "before the first heading"},
		{"unknown service", "tcp/0:\na .\n", `service "tcp/0"`},
		{"unknown cell", "icmp:\na x\n", `cell 'x'`},
		{"short row", "icmp:\na .+\nb +\n", "row b has 1 cells, want 2"},
		{"other rows in a later block", "icmp:\na .\ntcp/1:\nb .\n", "row b: the rows of every block"},
		{"missing row", "icmp:\na .+\nb +.\ntcp/1:\na .+\n", "has 1 rows, the first has 2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseMatrix([]byte(tt.text))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// TestMatrixSeen sums up probes per cell: families that differ, services that differ.
func TestMatrixSeen(t *testing.T) {
	m, err := parseMatrix([]byte("tcp/1 udp/1:\na .+\nb +.\n"))
	if err != nil {
		t.Fatal(err)
	}
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")}
	ends := []*endpoint{{name: "a", addrs: addrs}, {name: "b", addrs: addrs}}
	tests := []struct {
		name     string
		answered func(*probe) bool
		want     string
	}{
		{"all", func(*probe) bool { return true }, ".+ +."},
		{"none", func(*probe) bool { return false }, ".- -."},
		{"IPv4 only", func(p *probe) bool { return p.to.Is4() }, ".4 4."},
		{"IPv6 only", func(p *probe) bool { return p.to.Is6() }, ".6 6."},
		{"TCP only", func(p *probe) bool { return p.service.protocol == policy.TCP }, ".? ?."},
		{"from a only", func(p *probe) bool { return p.src.name == "a" }, ".+ -."},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			probes := m.probes(ends)
			for _, p := range probes {
				p.answered = tt.answered(p)
			}
			cells := m.seen(probes).blocks[0].cells
			if got := string(cells[0]) + " " + string(cells[1]); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

// startDemo starts the demo under the name that users start it by.
func startDemo(t *testing.T, stdout, stderr io.Writer) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "nftcni") // TestMain runs the product under this name
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin, "demo")
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// TestKernelDemo runs the whole demo as a user does.
func TestKernelDemo(t *testing.T) {
	var out bytes.Buffer
	err := startDemo(t, &out, &out).Wait()
	if err != nil && strings.Contains(out.String(), "restricts user namespaces") {
		t.Skip("user namespaces: this system does not let this user make one")
	}
	if err != nil {
		t.Fatalf("nftcni demo: %v\n%s", err, &out)
	}
	if n := strings.Count(out.String(), "; 0 cells differ."); n != 3 || !strings.Contains(out.String(), "All as expected") {
		t.Errorf("got %d matrices without difference, want 3:\n%s", n, &out)
	}
}

// TestKernelDemoInterrupted ends the demo in the middle, in each way there is: every
// process in its namespaces must be gone with it, and so the namespaces.
func TestKernelDemoInterrupted(t *testing.T) {
	for _, signal := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		t.Run(unix.SignalName(signal), func(t *testing.T) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			cmd := startDemo(t, io.Discard, w)
			w.Close()
			lines := bufio.NewScanner(r)
			if !lines.Scan() || strings.Contains(lines.Text(), "restricts user namespaces") {
				t.Skip("user namespaces: this system does not let this user make one")
			}
			inside := childNetNS(t, cmd.Process.Pid)
			for lines.Scan() && !strings.HasPrefix(lines.Text(), "attaching") {
			}
			if err := cmd.Process.Signal(signal); err != nil { // now the agent runs
				t.Fatalf("%v; it said last: %s", err, lines.Text())
			}
			go io.Copy(io.Discard, r) // or what it still has to say would block it
			_ = cmd.Wait()            // the status says how it ended
			if got, want := cmd.ProcessState.ExitCode(), 128+int(signal); signal != unix.SIGKILL && got != want {
				t.Errorf("it ended with status %d, want %d", got, want)
			}
			// The kernel kills orphans after their parent is gone, not before.
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			limit := time.After(30 * time.Second)
			for left := processesIn(inside); len(left) > 0; left = processesIn(inside) {
				select {
				case <-tick.C:
				case <-limit:
					t.Fatalf("processes %v are left in the demo's namespace", left)
				}
			}
		})
	}
}

// childNetNS is the network namespace of the only child of a process.
func childNetNS(t *testing.T, parent int) string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, stat := range stats {
		text, err := os.ReadFile(stat)
		if err != nil {
			continue // it ended meanwhile
		}
		_, after, _ := strings.Cut(string(text), ") ") // proc(5): pid (comm) state ppid ...
		if f := strings.Fields(after); len(f) > 1 && f[1] == strconv.Itoa(parent) {
			ns, err := os.Readlink(filepath.Join(filepath.Dir(stat), "ns/net"))
			if err != nil {
				t.Fatal(err)
			}
			return ns
		}
	}
	t.Fatalf("process %d has no child", parent)
	return ""
}

// processesIn lists the processes in a network namespace.
func processesIn(ns string) []string {
	var in []string
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net") // the pattern is well formed
	for _, link := range links {
		if got, err := os.Readlink(link); err == nil && got == ns {
			in = append(in, link)
		}
	}
	return in
}
