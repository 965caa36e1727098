package debug

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// fakeAgent answers on the socket of a run directory, which it returns.
func fakeAgent(t *testing.T) string {
	t.Helper()
	web := policy.Pod{Name: policy.Name{Namespace: "shop", Name: "web"}, UID: "u1", Node: "n1", Labels: policy.MakeLabels(map[string]string{"app": "web"}),
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	db := policy.Policy{ID: policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: "shop", Name: "db"}}, Generation: 3,
		Tier: policy.TierNamespaced, Applies: [2]bool{true, false}, Isolates: true}
	answers := map[string]any{
		agent.PathPods:     []agent.Pod{{Pod: web, Local: true, Interfaces: []string{"nft000000000001"}}},
		agent.PathPolicies: []agent.Policy{{Policy: db, EnforcedGeneration: 3, EnforcedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Micros: 700, LocalPods: 1}},
		agent.PathSnapshot: agent.Snapshot{Node: "n1", Cluster: &policy.Cluster{Pods: []policy.Pod{web}, Policies: []policy.Policy{db}}},
	}
	dir := t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(dir, cni.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := json.NewEncoder(w).Encode(answers[r.URL.Path]); err != nil {
			t.Error(err)
		}
	})}
	go func() { _ = srv.Serve(ln) }() // ends with Close
	t.Cleanup(func() { _ = srv.Close() })
	return dir
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	root := &cobra.Command{Use: "nftcni", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(NewCommand())
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&bytes.Buffer{})
	root.SetArgs(args)
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out.String()
}

func TestCompletion(t *testing.T) {
	dir := fakeAgent(t)
	for _, test := range []struct{ args, want string }{
		{"why|shop/", "shop/web"},
		{"why|shop/web|", "shop/web"},
		{"capture|shop/w", "shop/web"},
		{"trace|--from|shop/", "shop/web"},
		{"flows|--pod|shop/", "shop/web"},
		{"wait|", "policy"},
		{"wait|policy|shop/", "shop/db"},
		{"impact|--delete|policy/", "policy/shop/db"},
		{"pods|-o|", "yaml"},
	} {
		t.Run(test.args, func(t *testing.T) {
			got := run(t, append([]string{cobra.ShellCompNoDescRequestCmd, "debug", "--run-dir", dir}, strings.Split(test.args, "|")...)...)
			if !strings.Contains("\n"+got, "\n"+test.want+"\n") {
				t.Errorf("%q is not offered:\n%s", test.want, got)
			}
		})
	}
}

// The forms that programs read.
func TestListsForPrograms(t *testing.T) {
	dir := fakeAgent(t)
	for _, test := range []struct{ command, want string }{
		{"pods", `[{"namespace":"shop","name":"web","node":"n1","local":true,"addresses":["10.0.0.1"],"interfaces":["nft000000000001"],"labels":{"app":"web"}}]`},
		{"policies", `[{"namespace":"shop","name":"db","kind":"NetworkPolicy","directions":["ingress"],"ingressRules":0,"egressRules":0,` +
			`"localPods":1,"generation":3,"enforcedAt":"2026-01-02T03:04:05Z","micros":700}]`},
	} {
		t.Run(test.command, func(t *testing.T) {
			var got bytes.Buffer
			if err := json.Compact(&got, []byte(run(t, "debug", test.command, "--run-dir", dir, "-o", "json"))); err != nil {
				t.Fatal(err)
			}
			if got.String() != test.want {
				t.Errorf("got  %s\nwant %s", got.String(), test.want)
			}
			if yaml := run(t, "debug", test.command, "--run-dir", dir, "-o", "yaml"); !strings.Contains(yaml, "name: ") {
				t.Errorf("YAML lacks the name:\n%s", yaml)
			}
		})
	}
}

// Every command has an example and says in a line what it is for.
func TestHelp(t *testing.T) {
	for _, parent := range []*cobra.Command{NewCommand(), NewPolicyCommand()} {
		for _, c := range parent.Commands() {
			if c.Example == "" || c.Short == "" {
				t.Errorf("%s: example %q, short %q", c.CommandPath(), c.Example, c.Short)
			}
		}
	}
}

// Without the agent, pods come from its snapshot file.
func TestPodsOfSnapshot(t *testing.T) {
	dir := t.TempDir()
	pod := func(name, node string) policy.Pod {
		return policy.Pod{Name: policy.Name{Namespace: "shop", Name: name}, Node: node, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
	}
	b, err := json.Marshal(agent.Snapshot{Node: "n1", Cluster: &policy.Cluster{Pods: []policy.Pod{pod("web", "n1"), pod("far", "n2")}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, agent.SnapshotName), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := run(t, "debug", "pods", "--run-dir", dir); !strings.Contains(got, "web") || strings.Contains(got, "far") {
		t.Errorf("want web alone:\n%s", got)
	}
	if got := run(t, "debug", "pods", "--all", "--run-dir", dir); !strings.Contains(got, "far") {
		t.Errorf("want the pod of another node too:\n%s", got)
	}
}
