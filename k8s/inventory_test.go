package k8s

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/google/go-cmp/cmp"

	"github.com/nftcni/nftcni/policy"
)

// describe prints events one per line, so that a table can state them.
func describe(events []policy.Event) []string {
	var out []string
	for _, e := range events {
		sign := "+"
		if e.Delete {
			sign = "-"
		}
		what := ""
		switch {
		case e.Namespace != nil:
			what = "Namespace " + e.Namespace.Name
			if e.Namespace.Labels != namespaceWith(e.Namespace.Name, nil).Labels && !e.Delete {
				what += " labelled"
			}
		case e.Node != nil:
			what = "Node " + e.Node.Name
		case e.Pod != nil:
			what = "Pod " + e.Pod.Name.String() + " " + e.Pod.Labels.String()
		case e.Policy != nil && e.Delete:
			what = "Policy " + e.Policy.ID.String()
		case e.Policy != nil:
			what = fmt.Sprintf("Policy %s generation %d rules %d", e.Policy.ID, e.Policy.Generation, len(e.Policy.Rules[policy.Ingress]))
		}
		out = append(out, strings.TrimSpace(sign+what))
	}
	return out
}

func netpol(name string, rules int) string {
	return "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: " + name + ", namespace: a}\nspec: {ingress: [" + strings.Repeat("{},", rules) + "]}\n---\n"
}

const (
	podP    = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a, labels: {x: z}}\n---\n"
	spaceA  = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {x: z}}\n---\n"
	refused = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: q, namespace: a}\nspec: {policyTypes: [Ingress], ingress: [{from: [{}]}]}\n---\n"
	garbage = "a: 1\n b: 2\n---\n"
)

// TestInventory: steps of file changes ("" deletes the file) and the events they give.
func TestInventory(t *testing.T) {
	type step struct {
		files map[string]string
		want  []string
	}
	one := func(file, content string, want ...string) step { return step{map[string]string{file: content}, want} }
	tests := []struct {
		name  string
		steps []step
	}{
		{"object comes, changes, goes", []step{
			one("f", podP, "+Namespace a", "+Pod a/p x=z"),
			one("f", podP),
			one("f", strings.Replace(podP, "x: z", "x: w", 1), "+Pod a/p x=w"),
			one("f", "", "-Pod a/p x=w", "-Namespace a"),
		}},
		{"a refused version keeps the accepted one, also when it is refused again", []step{
			one("f", netpol("q", 2), "+Namespace a", "+Policy a/q generation 1 rules 2"),
			one("f", refused),
			one("f", refused+"# again"),
			one("f", netpol("q", 1), "+Policy a/q generation 2 rules 1"),
			one("f", netpol("q", 1)),
		}},
		{"a policy that was never valid isolates, then comes into force", []step{
			one("f", refused, "+Namespace a", "+Policy a/q generation 1 rules 0"),
			one("f", netpol("q", 1), "+Policy a/q generation 2 rules 1"),
		}},
		{"an unreadable document keeps the objects it may have held, others follow the file", []step{
			one("f", podP+netpol("q", 1), "+Namespace a", "+Policy a/q generation 1 rules 1", "+Pod a/p x=z"),
			one("f", garbage+netpol("q", 2), "+Policy a/q generation 2 rules 2"),
			one("f", netpol("q", 2), "-Pod a/p x=z"),
		}},
		{"a truncated file that is still valid counts", []step{
			one("f", netpol("q", 1)+netpol("r", 1), "+Namespace a", "+Policy a/q generation 1 rules 1", "+Policy a/r generation 1 rules 1"),
			one("f", netpol("q", 1), "-Policy a/r"),
		}},
		{"moved to another file in one change: no event", []step{
			one("f", netpol("q", 1), "+Namespace a", "+Policy a/q generation 1 rules 1"),
			{map[string]string{"f": "", "g": netpol("q", 1)}, nil},
		}},
		{"moved to another file while it is refused: the accepted version goes along", []step{
			one("f", netpol("q", 1), "+Namespace a", "+Policy a/q generation 1 rules 1"),
			{map[string]string{"f": "", "g": refused}, nil},
			one("g", "", "-Policy a/q", "-Namespace a"),
		}},
		{"renamed policy: the new one comes before the old one goes", []step{
			one("f", netpol("z", 1), "+Namespace a", "+Policy a/z generation 1 rules 1"),
			one("f", netpol("b", 1), "+Policy a/b generation 1 rules 1", "-Policy a/z"),
		}},
		{"two definitions: the first path wins, the second takes over", []step{
			one("g", netpol("q", 2), "+Namespace a", "+Policy a/q generation 1 rules 2"),
			one("f", netpol("q", 1), "+Policy a/q generation 2 rules 1"),
			one("f", "", "+Policy a/q generation 3 rules 2"),
		}},
		{"two definitions in one file: the first wins", []step{
			one("f", netpol("q", 1)+netpol("q", 2), "+Namespace a", "+Policy a/q generation 1 rules 1"),
		}},
		{"two definitions: a valid one wins over a refused one", []step{
			one("g", netpol("q", 2), "+Namespace a", "+Policy a/q generation 1 rules 2"),
			one("f", refused),
		}},
		{"namespace: implied, explicit, implied again, gone", []step{
			one("f", podP, "+Namespace a", "+Pod a/p x=z"),
			one("g", spaceA, "+Namespace a labelled"),
			one("g", "", "+Namespace a"),
			one("f", "", "-Pod a/p x=z", "-Namespace a"),
		}},
		{"namespace: members go first", []step{
			{map[string]string{"f": podP, "g": spaceA}, []string{"+Namespace a labelled", "+Pod a/p x=z"}},
			{map[string]string{"f": ""}, []string{"-Pod a/p x=z"}},
			one("g", "", "-Namespace a"),
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inv := newInventory()
			for i, s := range tt.steps {
				files := map[string]*parsedFile{}
				for name, content := range s.files {
					files[name] = nil
					if content != "" {
						parsed := parseFile(name, []byte(content))
						files[name] = &parsed
					}
				}
				got := describe(inv.update(files))
				if diff := cmp.Diff(s.want, got); diff != "" {
					t.Errorf("step %d (-want +got):\n%s", i, diff)
				}
			}
		})
	}
}

func TestInventoryProblems(t *testing.T) {
	inv := newInventory()
	update := func(name, content string) string {
		parsed := parseFile(name, []byte(content))
		inv.update(map[string]*parsedFile{name: &parsed})
		var lines []string
		for _, p := range inv.problems(nil) {
			lines = append(lines, p.String())
		}
		return strings.Join(lines, "\n")
	}
	tests := []struct{ name, file, content, want string }{
		{"never valid", "f", refused, "the pods it selects are isolated until it is valid"},
		{"mended", "f", netpol("q", 1), ""},
		{"turned invalid", "f", refused, "its last accepted version stays in force"},
		{"defined twice", "g", netpol("q", 1), "the definition in g:1 is in force"},
		{"both mended", "f", "", ""},
	}
	for _, tt := range tests {
		if got := update(tt.file, tt.content); !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// TestInventoryIncremental: after any changes of files, what the events built up equals
// what is in force, and with only valid files equals reading them all at once.
func TestInventoryIncremental(t *testing.T) {
	contents := []string{"", podP, spaceA, netpol("q", 1), netpol("q", 2), netpol("r", 1), refused, garbage}
	rapid.Check(t, func(t *rapid.T) {
		inv, state, valid := newInventory(), map[objectKey]policy.Event{}, map[string]string{}
		broken := false
		t.Repeat(map[string]func(*rapid.T){
			"change": func(t *rapid.T) {
				files := map[string]*parsedFile{}
				for range rapid.IntRange(1, 2).Draw(t, "files") {
					name := rapid.SampledFrom([]string{"f", "g", "h"}).Draw(t, "name")
					text := strings.Join(rapid.SliceOfN(rapid.SampledFrom(contents), 0, 3).Draw(t, "content"), "")
					broken = broken || strings.Contains(text, refused) || strings.Contains(text, garbage)
					valid[name], files[name] = text, nil
					if text != "" {
						parsed := parseFile(name, []byte(text))
						files[name] = &parsed
					}
				}
				for _, e := range inv.update(files) {
					if e.Delete {
						delete(state, eventKey(e))
					} else {
						state[eventKey(e)] = e
					}
				}
			},
			"": func(t *rapid.T) {
				if diff := cmp.Diff(inv.cluster(), snapshot(maps.Values(state)), values); diff != "" {
					t.Fatalf("in force (-) and events (+) differ:\n%s", diff)
				}
				if broken {
					return
				}
				fresh, files := newInventory(), map[string]*parsedFile{}
				for _, name := range slices.Sorted(maps.Keys(valid)) {
					parsed := parseFile(name, []byte(valid[name]))
					files[name] = &parsed
				}
				fresh.update(files)
				if diff := cmp.Diff(clearGenerations(fresh.cluster()), clearGenerations(inv.cluster()), values); diff != "" {
					t.Fatalf("from scratch (-) and incremental (+) differ:\n%s", diff)
				}
			},
		})
	})
}

func clearGenerations(c *policy.Cluster) *policy.Cluster {
	for i := range c.Policies {
		c.Policies[i].Generation = 0
	}
	return c
}
