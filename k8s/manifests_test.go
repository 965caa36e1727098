package k8s

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/nftcni/nftcni/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// mirrorSink keeps what a Source says is there.
type mirrorSink struct {
	mu       sync.Mutex
	changed  *sync.Cond
	started  bool
	calls    int
	state    map[objectKey]policy.Event
	problems []Problem
	check    func(map[objectKey]policy.Event) // called with every state
}

func newMirrorSink() *mirrorSink {
	s := &mirrorSink{state: map[objectKey]policy.Event{}}
	s.changed = sync.NewCond(&s.mu)
	return s
}

func (s *mirrorSink) Replace(c *policy.Cluster, problems []Problem) {
	var events []policy.Event
	for i := range c.Namespaces {
		events = append(events, policy.Event{Namespace: &c.Namespaces[i]})
	}
	for i := range c.Nodes {
		events = append(events, policy.Event{Node: &c.Nodes[i]})
	}
	for i := range c.Pods {
		events = append(events, policy.Event{Pod: &c.Pods[i]})
	}
	for i := range c.Policies {
		events = append(events, policy.Event{Policy: &c.Policies[i]})
	}
	s.mu.Lock()
	if s.started {
		panic("Replace is called twice")
	}
	s.started = true
	s.mu.Unlock()
	s.Apply(events, problems)
}

func (s *mirrorSink) Apply(events []policy.Event, problems []Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.started {
		panic("Apply is called before Replace")
	}
	for _, e := range events {
		if e.Delete {
			delete(s.state, eventKey(e))
		} else {
			s.state[eventKey(e)] = e
		}
	}
	s.calls++
	s.problems = problems
	if s.check != nil {
		s.check(s.state)
	}
	s.changed.Broadcast()
}

// await waits until ok of the state holds.
func (s *mirrorSink) await(t *testing.T, what string, ok func(state map[objectKey]policy.Event, problems []Problem) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second) // a hang, not a measure
	defer cancel()
	defer context.AfterFunc(ctx, s.changed.Broadcast)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.started || !ok(s.state, s.problems) {
		if ctx.Err() != nil {
			t.Fatalf("waiting for %s: state %v, problems %v", what, slices.Collect(maps.Keys(s.state)), s.problems)
		}
		s.changed.Wait()
	}
}

func (s *mirrorSink) awaitObjects(t *testing.T, keys ...string) {
	t.Helper()
	want := map[string]bool{}
	for _, k := range keys {
		want[k] = true
	}
	s.await(t, fmt.Sprint(keys), func(state map[objectKey]policy.Event, _ []Problem) bool {
		got := map[string]bool{}
		for k := range state {
			got[k.String()] = true
		}
		return cmp.Equal(want, got)
	})
}

// start runs the Source until the test ends.
func start(t *testing.T, src Source, sink Sink) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- src.Run(ctx, sink) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestManifestsFollow: every way in which files and directories come, change and go.
func TestManifestsFollow(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	space := func(name string) string { return "apiVersion: v1\nkind: Namespace\nmetadata: {name: " + name + "}\n" }
	write(t, file("a.yaml"), space("a"))
	write(t, file("ignored.txt"), space("ignored"))
	write(t, file(".hidden.yaml"), space("hidden"))
	sink := newMirrorSink()
	start(t, NewManifests(dir, ManifestOptions{}), sink)
	sink.awaitObjects(t, "Namespace a")

	write(t, file("b.yml"), space("b"))
	sink.awaitObjects(t, "Namespace a", "Namespace b")
	write(t, file("b.yml"), space("b2"))
	sink.awaitObjects(t, "Namespace a", "Namespace b2")
	write(t, file("tmp"), space("c"))
	must(t, os.Rename(file("tmp"), file("c.json")))
	sink.awaitObjects(t, "Namespace a", "Namespace b2", "Namespace c")
	must(t, os.Rename(file("c.json"), file("d.yaml")))
	must(t, os.Remove(file("b.yml")))
	sink.awaitObjects(t, "Namespace a", "Namespace c")
	must(t, os.Rename(file("d.yaml"), file("d.bak")))
	sink.awaitObjects(t, "Namespace a")
	must(t, os.Link(file("d.bak"), file("e.yaml")))
	sink.awaitObjects(t, "Namespace a", "Namespace c")
	must(t, os.Remove(file("e.yaml")))
	sink.awaitObjects(t, "Namespace a")

	must(t, os.MkdirAll(file("x/y"), 0o700))
	write(t, file("x/y/f.yaml"), space("f"))
	sink.awaitObjects(t, "Namespace a", "Namespace f")
	must(t, os.Rename(file("x"), file("z")))
	write(t, file("z/y/g.yaml"), space("g"))
	sink.awaitObjects(t, "Namespace a", "Namespace f", "Namespace g")
	outside := filepath.Join(t.TempDir(), "z")
	must(t, os.Rename(file("z"), outside))
	sink.awaitObjects(t, "Namespace a")
	write(t, filepath.Join(outside, "y/h.yaml"), space("h"))
	must(t, os.Rename(outside, file("z")))
	sink.awaitObjects(t, "Namespace a", "Namespace f", "Namespace g", "Namespace h")
	must(t, os.RemoveAll(file("z")))
	sink.awaitObjects(t, "Namespace a")

	// A ConfigMap volume: files are links through ..data, which changes in one rename.
	for i, name := range []string{"v", "w"} {
		version := fmt.Sprintf("..%d", i)
		must(t, os.Mkdir(file(version), 0o700))
		write(t, file(version+"/m.yaml"), space(name))
		must(t, os.Symlink(version, file("..tmp")))
		must(t, os.Rename(file("..tmp"), file("..data")))
		if i == 0 {
			must(t, os.Symlink("..data/m.yaml", file("m.yaml")))
		}
		sink.awaitObjects(t, "Namespace a", "Namespace "+name)
	}
}

// TestManifestsUnreadable: what cannot be read is a problem and changes nothing.
func TestManifestsUnreadable(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	write(t, path, spaceA)
	sink := newMirrorSink()
	start(t, NewManifests(dir, ManifestOptions{}), sink)
	sink.awaitObjects(t, "Namespace a")
	problem := func(text string) {
		t.Helper()
		sink.await(t, text, func(state map[objectKey]policy.Event, problems []Problem) bool {
			if text == "" {
				return len(state) == 1 && len(problems) == 0
			}
			return len(state) == 1 && len(problems) == 1 && strings.Contains(problems[0].String(), text)
		})
	}
	write(t, path, "{")
	problem("YAML syntax")
	write(t, path, spaceA)
	problem("")
	must(t, os.Rename(dir, dir+".away"))
	problem("stay as they were")
	must(t, os.Rename(dir+".away", dir))
	problem("")
}

func TestManifestsNoDirectory(t *testing.T) {
	err := NewManifests(filepath.Join(t.TempDir(), "none"), ManifestOptions{}).Run(t.Context(), newMirrorSink())
	if err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("got %v, want an error that names the directory", err)
	}
	if _, _, err := LoadDir(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("LoadDir of nothing gave no error")
	}
}

// TestManifestsHalfWritten truncates and rewrites a file in place, in two writes with
// the file closed only after the second, 1,000 times. Both halves alone are valid
// manifests, and so is nothing: only the close says that the file is complete. At no
// time may the policy be missing, or without the rules of both halves.
func TestManifestsHalfWritten(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "p.yaml")
	first, second := netpol("q", 1), netpol("r", 1)
	write(t, path, first+second)
	sink := newMirrorSink()
	states := 0
	sink.check = func(state map[objectKey]policy.Event) {
		states++
		q, r := state[objectKey{KindNetworkPolicy, "a", "q"}], state[objectKey{KindNetworkPolicy, "a", "r"}]
		if q.Policy == nil || r.Policy == nil {
			t.Errorf("a policy is missing in state %d", states)
		}
	}
	start(t, NewManifests(dir, ManifestOptions{}), sink)
	sink.awaitObjects(t, "Namespace a", "NetworkPolicy a/q", "NetworkPolicy a/r")
	for i := range 1000 {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
		must(t, err)
		_, err = f.WriteString(netpol("q", 1+i%2))
		must(t, err)
		_, err = f.WriteString(second)
		must(t, err)
		must(t, f.Close())
	}
	write(t, path, netpol("q", 3)+second)
	sink.await(t, "the last version", func(state map[objectKey]policy.Event, _ []Problem) bool {
		return len(state[objectKey{KindNetworkPolicy, "a", "q"}].Policy.Rules[policy.Ingress]) == 3
	})
	t.Logf("%d states seen", states)
}

// TestManifestsReplacedByDelete: an editor that deletes and creates leaves no gap, and
// what stays deleted goes. The clock is the test's.
func TestManifestsReplacedByDelete(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "p.yaml")
	write(t, path, netpol("q", 1))
	w, err := newWatcher(dir)
	must(t, err)
	defer func() { must(t, w.close()) }()
	f, now := newFollower(dir, w, slog.New(slog.DiscardHandler)), time.Unix(0, 0)
	step := func(after time.Duration, want ...string) {
		t.Helper()
		now = now.Add(after)
		if diff := cmp.Diff(want, describe(f.follow(changes{paths: map[string]bool{path: true}, rescan: true}, now))); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	}
	step(0, "+Namespace a", "+Policy a/q generation 1 rules 1")
	must(t, os.Remove(path))
	step(0)
	step(goneGrace - 1)
	write(t, path, netpol("q", 2))
	step(1, "+Policy a/q generation 2 rules 2")
	step(goneGrace)
	must(t, os.Remove(path))
	step(0)
	step(goneGrace, "-Policy a/q", "-Namespace a")
	step(goneGrace)
	write(t, path, netpol("q", 1))
	step(0, "+Namespace a", "+Policy a/q generation 1 rules 1")
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o700))
	step(0)
	step(goneGrace, "-Policy a/q", "-Namespace a")
}

// TestReadFileLease: while it is open for writing a file is busy.
func TestReadFileLease(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "x")
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	if _, err := readFile(path); !errors.Is(err, errBusy) {
		t.Errorf("got %v while a writer has the file open, want %v", err, errBusy)
	}
	must(t, w.Close())
	if data, err := readFile(path); err != nil || string(data) != "x" {
		t.Errorf("got %q, %v", data, err)
	}
}

// TestSharedPolicies loads every policy that the owner's documents show.
func TestSharedPolicies(t *testing.T) {
	c, problems, err := LoadDir("../testdata/policies")
	must(t, err)
	var names []string
	for _, p := range c.Policies {
		names = append(names, p.ID.String())
	}
	want := []string{"allow-egress/allow-all-egress", "allow-ingress/allow-all-ingress", "data/test-network-policy", "default/allow-metrics-prom",
		"default/allow-redis-nodejs", "default/test-network-policy", "deny-egress/deny-all-egress", "deny-ingress/deny-all-ingress"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("policies (-want +got):\n%s", diff)
	}
	unsupported := map[string]int{}
	for _, p := range problems {
		unsupported[filepath.Base(p.File)]++
		if !strings.Contains(p.Message, "unsupported kind") && !strings.HasSuffix(p.File, "cni-network-configurations.json") {
			t.Errorf("unexpected problem %s", p)
		}
	}
	wantProblems := map[string]int{"calico-global-and-hosts.yaml": 5, "calico-network-policy.yaml": 2, "cilium.yaml": 3, "cni-network-configurations.json": 1}
	if diff := cmp.Diff(wantProblems, unsupported); diff != "" {
		t.Errorf("problems by file (-want +got):\n%s", diff)
	}
	err = filepath.WalkDir("../testdata/policies", func(path string, d fs.DirEntry, err error) error {
		if err == nil && isManifest(path) {
			if _, _, err := LoadDir(path); err != nil {
				t.Errorf("load one file: %v", err)
			}
		}
		return err
	})
	must(t, err)
}
