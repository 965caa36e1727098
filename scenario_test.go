package main

import (
	"bytes"
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

// scenarioNode is the node whose tables and packets are tested.
const scenarioNode = "demo"

// scenario is one file of testdata/scenario: a txtar archive whose comment says what it
// shows, with
//
//	include       names of files of testdata, a line each, read as manifests (optional)
//	cluster.yaml  ordinary Kubernetes YAML (the nodes of nodes.yaml are added)
//	flows         lines "SRC DST SERVICE allow|deny  # why"
//	tables        the elements it compiles to, kept by TestScenarioGolden
//
// SRC and DST are a pod (namespace/name), node (the node that is tested), world
// (203.0.113.10 and 2001:db8:ffff::10) or an address. A flow holds for every family
// that both ends have.
type scenario struct {
	name      string
	manifests map[string][]byte // by file name
	cluster   *policy.Cluster
	flows     []scenarioFlow
	tables    string
}

type scenarioFlow struct {
	line     string
	src, dst string
	service  service
	allow    bool
}

// question is a flow between two addresses.
type question struct {
	scenarioFlow
	policy.Flow
}

func loadScenarios(t *testing.T) []*scenario {
	t.Helper()
	names, err := filepath.Glob("testdata/scenario/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatalf("no scenarios (%v)", err)
	}
	var all []*scenario
	for _, name := range names {
		s, err := loadScenario(name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all = append(all, s)
	}
	return all
}

func loadScenario(name string) (*scenario, error) {
	archive, err := txtar.ParseFile(name)
	if err != nil {
		return nil, err
	}
	s := &scenario{name: strings.TrimSuffix(filepath.Base(name), ".txtar"), manifests: map[string][]byte{}}
	if err := s.include("scenario/nodes.yaml"); err != nil {
		return nil, err
	}
	for _, f := range archive.Files {
		switch f.Name {
		case "include":
			for _, file := range strings.Fields(string(f.Data)) {
				if err := s.include(file); err != nil {
					return nil, err
				}
			}
		case "cluster.yaml":
			s.manifests[f.Name] = f.Data
		case "flows":
			if s.flows, err = parseFlows(f.Data); err != nil {
				return nil, err
			}
		case "tables":
			s.tables = string(f.Data)
		default:
			return nil, fmt.Errorf("file %q: want include, cluster.yaml, flows or tables", f.Name)
		}
	}
	return s, s.load()
}

func (s *scenario) include(file string) error {
	data, err := os.ReadFile(filepath.Join("testdata", file))
	s.manifests[filepath.Base(file)] = data
	return err
}

// load reads the manifests as the agent reads a directory.
func (s *scenario) load() error {
	dir, err := os.MkdirTemp("", "nftcni-scenario-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := s.writeTo(dir); err != nil {
		return err
	}
	cluster, problems, err := k8s.LoadDir(dir)
	if err != nil {
		return err
	}
	for _, p := range problems {
		if p.Severity == k8s.Refused {
			return fmt.Errorf("manifests: %v", p)
		}
	}
	s.cluster = cluster
	return nil
}

func (s *scenario) writeTo(dir string) error {
	for name, data := range s.manifests {
		if err := writeRenamed(filepath.Join(dir, name), data); err != nil {
			return err
		}
	}
	return nil
}

func parseFlows(data []byte) ([]scenarioFlow, error) {
	var flows []scenarioFlow
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		words, _, _ := strings.Cut(line, "#")
		f := strings.Fields(words)
		if len(f) == 0 {
			continue
		}
		if len(f) != 4 || f[3] != "allow" && f[3] != "deny" {
			return nil, fmt.Errorf("flow %q: want SRC DST SERVICE allow or deny", line)
		}
		svc, err := parseService(f[2])
		if err != nil {
			return nil, fmt.Errorf("flow %q: %w", line, err)
		}
		flows = append(flows, scenarioFlow{line, f[0], f[1], svc, f[3] == "allow"})
	}
	if len(flows) == 0 {
		return nil, fmt.Errorf("no flows")
	}
	return flows, nil
}

// addrs resolves an end of a flow.
func (s *scenario) addrs(end string) ([]netip.Addr, error) {
	switch {
	case end == "world":
		return outsideEnds()["world"], nil
	case end == "node":
		i := slices.IndexFunc(s.cluster.Nodes, func(n policy.Node) bool { return n.Name == scenarioNode })
		return s.cluster.Nodes[i].Addrs, nil
	case strings.Contains(end, "/"):
		for _, p := range s.cluster.Pods {
			if p.Name.String() == end {
				return p.Addrs, nil
			}
		}
		return nil, fmt.Errorf("no pod %s", end)
	}
	a, err := netip.ParseAddr(end)
	return []netip.Addr{a}, err
}

// questions lists every flow over every family that both of its ends have.
func (s *scenario) questions(t *testing.T) []question {
	t.Helper()
	var all []question
	for _, f := range s.flows {
		src, err := s.addrs(f.src)
		dst, err2 := s.addrs(f.dst)
		if err = cmp.Or(err, err2); err != nil {
			t.Fatalf("%s: %v", f.line, err)
		}
		n := len(all)
		for _, pair := range (&endpoint{addrs: src}).families(&endpoint{addrs: dst}) {
			q := policy.Flow{Src: pair[0], Dst: pair[1], Protocol: f.service.protocol, Port: f.service.port}
			if q.Protocol == policy.ICMP {
				q.Port = icmpEchoRequest << 8
				if q.Dst.Is6() {
					q.Protocol, q.Port = policy.ICMPv6, icmpv6EchoRequest<<8
				}
			}
			all = append(all, question{f, q})
		}
		if len(all) == n {
			t.Fatalf("%s: the ends have no family in common", f.line)
		}
	}
	return all
}

// TestScenarioOracle asks the evaluator.
func TestScenarioOracle(t *testing.T) {
	for _, s := range loadScenarios(t) {
		t.Run(s.name, func(t *testing.T) {
			for _, q := range s.questions(t) {
				if got := policy.Evaluate(s.cluster, scenarioNode, q.Flow); got.Allowed != q.allow {
					t.Errorf("%s\n%s -> %s: the oracle says allowed=%v (egress %s, ingress %s)",
						q.line, q.Src, q.Dst, got.Allowed, got.Egress.Reason, got.Ingress.Reason)
				}
			}
		})
	}
}

// TestScenarioTables asks the compiled tables, for what they judge: a pod reaching
// itself or its own node passes before any table is asked.
func TestScenarioTables(t *testing.T) {
	for _, s := range loadScenarios(t) {
		t.Run(s.name, func(t *testing.T) {
			tables := policy.Compile(s.cluster, scenarioNode).Tables
			for _, q := range s.questions(t) {
				oracle := policy.Evaluate(s.cluster, scenarioNode, q.Flow)
				if reason := cmp.Or(oracle.Egress.Reason, oracle.Ingress.Reason); reason == policy.SamePod || reason == policy.OwnNode {
					continue
				}
				if got := tables.Decide(q.Flow); got.Allowed != q.allow {
					t.Errorf("%s\n%s -> %s: the tables say allowed=%v\negress %+v\ningress %+v",
						q.line, q.Src, q.Dst, got.Allowed, got.Egress, got.Ingress)
				}
			}
		})
	}
}

// TestScenarioForEveryPolicy makes sure that no policy file goes without a scenario, and that
// the demo shows the same files.
func TestScenarioForEveryPolicy(t *testing.T) {
	files, err := filepath.Glob("testdata/policies/kubernetes-*.yaml")
	if err != nil || len(files) < 5 {
		t.Fatalf("got policy files %v (%v), want at least the five of the owner", files, err)
	}
	scenarios := loadScenarios(t)
	for _, file := range files {
		base := filepath.Base(file)
		if !slices.ContainsFunc(scenarios, func(s *scenario) bool { return s.manifests[base] != nil }) {
			t.Errorf("%s is included by no scenario", file)
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		got, err := demoFiles.ReadFile("testdata/demo/manifests/" + base)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("testdata/demo/manifests/%s is not %s (%v)", base, file, err)
		}
	}
}
