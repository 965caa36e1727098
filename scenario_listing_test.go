package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// updateScenarios rewrites the section tables of the scenario files.
const updateScenarios = "NFTCNI_UPDATE"

// TestScenarioGolden compares the compiled elements with those in the scenario file, so
// that a change of the compiler shows in a review as what it does. NFTCNI_UPDATE=1 rewrites.
func TestScenarioGolden(t *testing.T) {
	for _, s := range loadScenarios(t) {
		t.Run(s.name, func(t *testing.T) {
			got := elementText(policy.Compile(s.cluster, scenarioNode))
			if os.Getenv(updateScenarios) != "" {
				if err := s.update(got); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(s.tables, got); diff != "" {
				t.Errorf("compiled elements differ from the file (-file +got); NFTCNI_UPDATE=1 rewrites it:\n%s", diff)
			}
		})
	}
}

// update replaces the section tables of the scenario's file.
func (s *scenario) update(tables string) error {
	name := filepath.Join("testdata/scenario", s.name+".txtar")
	archive, err := txtar.ParseFile(name)
	if err != nil {
		return err
	}
	archive.Files = slices.DeleteFunc(archive.Files, func(f txtar.File) bool { return f.Name == "tables" })
	archive.Files = append(archive.Files, txtar.File{Name: "tables", Data: []byte(tables)})
	return os.WriteFile(name, txtar.Format(archive), 0o644)
}

// elementText lists the elements one a line, each map's in order, with the names that
// the compiler gives their numbers.
func elementText(c *policy.Compiled) string {
	maps := map[policy.Map]string{
		policy.PodID: "pod_id", policy.NetID: "net_id", policy.IngressProfile: "ingress_profile", policy.EgressProfile: "egress_profile",
		policy.IsolatedIngress: "isolated_ingress", policy.IsolatedEgress: "isolated_egress", policy.Access: "access",
		policy.AccessOthers: "access_others", policy.AccessPort: "access_port", policy.AccessRange: "access_range", policy.AccessRest: "access_rest",
	}
	var lines []string
	for k, v := range c.Tables {
		key := ""
		switch k.Map {
		case policy.NetID:
			key = fmt.Sprintf("%s-%s", k.Addr, k.To)
		case policy.PodID, policy.IngressProfile, policy.EgressProfile, policy.IsolatedIngress, policy.IsolatedEgress:
			key = k.Addr.String()
		case policy.Access:
			key = fmt.Sprintf("%#x . %#x", k.X, k.Y)
		case policy.AccessPort:
			key = fmt.Sprintf("%#x . %d . %d", k.X, k.Protocol, k.First)
		case policy.AccessRange:
			key = fmt.Sprintf("%#x . %d . %d-%d", k.X, k.Protocol, k.First, k.Last)
		default:
			key = fmt.Sprintf("%#x", k.X)
		}
		line := fmt.Sprintf("%-16s %s", maps[k.Map], key)
		if k.Map != policy.IsolatedIngress && k.Map != policy.IsolatedEgress {
			line += fmt.Sprintf(" : %#x", v) // the others are maps
		}
		if comment := c.Comments[k]; comment != "" {
			line += "  # " + comment
		}
		lines = append(lines, line+"\n")
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// TestKernelListing programs every scenario, lists the table with nft, loads the
// listing into an empty namespace and lists it back: what we program must be text that
// an administrator's nft can print and read.
func TestKernelListing(t *testing.T) {
	for _, s := range loadScenarios(t) {
		t.Run(s.name, func(t *testing.T) {
			inFreshNode(t, func(t *testing.T) { s.testListing(t) })
		})
	}
}

func (s *scenario) testListing(t *testing.T) {
	table, err := nft.Open(t.Context(), nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	change := nft.Change{Delta: policy.NewEngine(scenarioNode).Replace(s.cluster)}
	for i, p := range s.localPods() {
		for _, a := range p.Addrs {
			change.Bind = append(change.Bind, nft.Binding{Interface: fmt.Sprintf("nft%012x", i), Addr: a, Masquerade: true, Comment: p.Name.String()})
		}
	}
	for _, n := range s.cluster.Nodes {
		change.PodNetworks = append(change.PodNetworks, n.PodCIDRs...)
	}
	if _, err := table.Apply(t.Context(), change); err != nil {
		t.Fatal(err)
	}
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	listed := listTable(t)
	elsewhere, err := newNetNS()
	if err != nil {
		t.Fatal(err)
	}
	var again []byte
	err = inNetNS(elsewhere, func() error {
		load := exec.CommandContext(t.Context(), "nft", "-f", "-")
		load.Stdin = bytes.NewReader(listed)
		if out, err := load.CombinedOutput(); err != nil {
			return fmt.Errorf("nft -f: %w\n%s", err, out)
		}
		var err error
		again, err = list(t.Context())
		return err
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, listed)
	}
	if diff := cmp.Diff(sortElements(listed), sortElements(again)); diff != "" {
		t.Errorf("the listing changes when it is loaded (-first +second):\n%s", diff)
	}
}

func listTable(t *testing.T) []byte {
	t.Helper()
	out, err := list(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// list runs nft in the calling thread's namespace.
func list(ctx context.Context) ([]byte, error) {
	out, err := exec.CommandContext(ctx, "nft", "list", "table", "inet", "nftcni").Output()
	if err != nil {
		return nil, fmt.Errorf("nft list: %w", err)
	}
	return out, nil
}

// sortElements puts every set's elements on lines of their own in a fixed order: the
// kernel lists a hash in the order of its buckets.
func sortElements(listing []byte) []string {
	var out []string
	text := string(listing)
	for {
		before, rest, found := strings.Cut(text, "elements = {")
		out = append(out, strings.Split(before, "\n")...)
		if !found {
			return out
		}
		var elements []string
		quoted, start, end := false, 0, 0
		for i, c := range rest {
			if c == '"' {
				quoted = !quoted
			}
			if quoted || c != ',' && c != '}' {
				continue
			}
			elements = append(elements, strings.Join(strings.Fields(rest[start:i]), " "))
			start = i + 1
			if c == '}' {
				end = i + 1
				break
			}
		}
		slices.Sort(elements)
		out = append(out, elements...)
		text = rest[end:]
	}
}
