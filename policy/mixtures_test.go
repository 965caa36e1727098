package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// tiny draws clusters so small that changes meet: four pods of few labels, three of them
// on this node, and policies of one kind.
type tiny struct{ *rand.Rand }

func (r tiny) pick(v ...string) string { return v[r.IntN(len(v))] }

func (r tiny) pod(i int) policy.Pod {
	p := policy.Pod{
		Name: policy.Name{Namespace: "ns0", Name: fmt.Sprint(i)}, UID: fmt.Sprint(i), Node: policytest.Node(i / 3), Addrs: []netip.Addr{policytest.Address(i, false)},
		Labels: policy.MakeLabels(map[string]string{"app": r.pick("a", "b", "c"), "role": r.pick("x", "y")}),
	}
	if r.IntN(4) == 0 {
		p.Ports = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: uint16(80 + r.IntN(2))}}
	}
	return p
}

func (r tiny) selector() policy.Selector {
	switch r.IntN(4) {
	case 0:
		return policy.Selector{}
	case 1:
		return policy.Selector{Requirements: []policy.Requirement{{Key: "role", Values: []string{r.pick("x", "y")}}}}
	}
	return policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{r.pick("a", "b", "c")}}}}
}

func (r tiny) rule() policy.Rule {
	var out policy.Rule
	switch r.IntN(8) {
	case 0:
	case 1:
		out.Peers = []policy.Peer{{Block: &policy.Block{CIDR: netip.PrefixFrom(policytest.Address(r.IntN(4), false), 30+r.IntN(3)).Masked()}}}
	default:
		out.Peers = []policy.Peer{{Pods: &policy.PodSelector{Namespace: "ns0", Pods: r.selector()}}}
	}
	switch r.IntN(6) {
	case 0:
		out.Ports = []policy.PortMatch{{Protocol: policy.TCP, First: 80, Last: uint16(80 + r.IntN(2))}}
	case 1:
		out.Ports = []policy.PortMatch{{Protocol: policy.TCP, First: 81, Last: 82}}
	case 2:
		out.Ports = []policy.PortMatch{{Protocol: policy.TCP, Name: "http"}}
	}
	return out
}

func (r tiny) policy(i int) policy.Policy {
	var rules []policy.Rule
	for range r.IntN(3) {
		rules = append(rules, r.rule())
	}
	return networkPolicy("ns0", fmt.Sprint(i), r.selector(), policy.Directions[i%2], rules...)
}

func (r tiny) cluster() *policy.Cluster {
	c := &policy.Cluster{}
	for i := range 4 {
		c.Pods = append(c.Pods, r.pod(i))
		c.Policies = append(c.Policies, r.policy(i))
	}
	return c
}

// change draws another cluster, in which each object is another one or the same.
func (r tiny) change(c *policy.Cluster) *policy.Cluster {
	out, often := r.cluster(), 1+r.IntN(3)
	for i := range 4 {
		if r.IntN(4) >= often {
			out.Pods[i] = c.Pods[i]
		}
		if r.IntN(4) >= often {
			out.Policies[i] = c.Policies[i]
		}
	}
	return out
}

func (r tiny) flow(*policy.Cluster) policy.Flow {
	from := r.IntN(4)
	return policy.Flow{
		Src: policytest.Address(from, false), Dst: policytest.Address((from+1+r.IntN(3))%4, false),
		Protocol: policy.TCP, Port: uint16(80 + r.IntN(3)),
	}
}

// TestMixtures changes labels, ports and policies of tiny clusters at once, as events or
// by adoption, and judges nearly all flows there are in between.
func TestMixtures(t *testing.T) {
	paused := [2]int{}
	for seed := range effort(60, 400, 400, 6000) {
		r := tiny{rand.New(rand.NewPCG(seed, 5))}
		f := newFollower(seed, policytest.Options{})
		f.flow, f.flows = r.flow, 0
		c := r.cluster()
		if err := f.follow(f.e.Replace(c)); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		f.flows = 24
		for i := range 6 {
			c = r.change(c)
			adopt := i % 2
			if adopt == 1 {
				f.e = newEngine(seed)
				f.e.Adopt(maps.Clone(f.tables))
			}
			d := f.e.Replace(c)
			if d.Pause > 0 {
				paused[adopt]++
			}
			if err := f.follow(d); err != nil {
				t.Fatalf("seed %d, change %d: %v", seed, i, err)
			}
		}
		if err := f.compare(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d deltas through a meet, %d of adoptions", paused[0], paused[1])
	if paused[0] == 0 || paused[1] == 0 {
		t.Error("no delta went through a meet")
	}
}

// labelledPod is the i-th pod, of the label podI and others.
func labelledPod(node, i int, labels ...string) policy.Pod {
	p := policy.Pod{Name: policy.Name{Namespace: "ns0", Name: fmt.Sprint(i)}, UID: fmt.Sprint(i), Node: policytest.Node(node), Addrs: []netip.Addr{policytest.Address(i, false)}}
	set := map[string]string{fmt.Sprint("pod", i): ""}
	for _, l := range labels {
		set[l] = ""
	}
	p.Labels = policy.MakeLabels(set)
	return p
}

// has selects what has the label.
func has(label string) policy.Selector {
	return policy.Selector{Requirements: []policy.Requirement{{Key: label, Op: policy.Exists}}}
}

func from(labels ...string) policy.Rule {
	var r policy.Rule
	for _, l := range labels {
		r.Peers = append(r.Peers, policy.Peer{Pods: &policy.PodSelector{Namespace: "ns0", Pods: has(l)}})
	}
	return r
}

func block(cidr string) policy.Rule {
	return policy.Rule{Peers: []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix(cidr)}}}}
}

func tcp(first, last uint16) []policy.PortMatch {
	return []policy.PortMatch{{Protocol: policy.TCP, First: first, Last: last}}
}

// TestMeetsAreFew: what only opens or only closes needs no profile in between, and what
// does both across directions has one, with a pause.
func TestMeetsAreFew(t *testing.T) {
	pod := func(i int, labels ...string) policy.Pod { return labelledPod(0, i, labels...) }
	ports := func(i int, d policy.Direction, first, last uint16) policy.Policy {
		return networkPolicy("ns0", fmt.Sprint("ports", i, d), has(fmt.Sprint("pod", i)), d, policy.Rule{Ports: []policy.PortMatch{{Protocol: policy.TCP, First: first, Last: last}}})
	}
	peers := func(i int, d policy.Direction, rules ...policy.Rule) policy.Policy {
		return networkPolicy("ns0", fmt.Sprint("peers", i, d), has(fmt.Sprint("pod", i)), d, rules...)
	}
	one := netip.PrefixFrom(policytest.Address(1, false), 32)
	other := netip.MustParsePrefix("10.9.0.0/24")
	in, out := policy.Ingress, policy.Egress
	pods := []policy.Pod{pod(1), pod(2), pod(3), pod(4), pod(5)}
	kept := ports(5, in, 90, 90)
	named := []policy.Policy{peers(2, in, from("from")), peers(1, out, from("to"))}
	for _, tc := range []struct {
		name     string
		was, is  policy.Cluster
		pause    [2]bool
		profiles [2]int // fresh ones: of events, of an adoption
	}{
		{
			"ports in both directions",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(1, in, 80, 80), ports(2, in, 80, 80), ports(3, out, 80, 80), ports(4, in, 80, 81), kept}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(1, in, 81, 81), ports(2, in, 80, 81), ports(3, out, 80, 81), ports(4, in, 80, 80), kept}},
			[2]bool{true, true}, [2]int{5, 5},
		},
		{
			"two pods through one meet",
			policy.Cluster{Pods: []policy.Pod{pod(1, "x"), pod(2, "x"), pod(3)}, Policies: []policy.Policy{networkPolicy("ns0", "x", has("x"), in, policy.Rule{Ports: tcp(80, 80)}), ports(3, out, 80, 80)}},
			policy.Cluster{Pods: []policy.Pod{pod(1, "x"), pod(2, "x"), pod(3)}, Policies: []policy.Policy{networkPolicy("ns0", "x", has("x"), in, policy.Rule{Ports: tcp(81, 81)}), ports(3, out, 80, 81)}},
			[2]bool{true, true}, [2]int{3, 3},
		},
		{
			"ports in one direction",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(1, in, 80, 80), ports(2, in, 80, 80), ports(4, in, 80, 81)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(1, in, 81, 81), ports(2, in, 80, 81), ports(4, in, 80, 80)}},
			[2]bool{}, [2]int{3, 3},
		},
		{
			"labels that close ingress and open egress",
			policy.Cluster{Pods: []policy.Pod{pod(1, "from"), pod(2)}, Policies: named},
			policy.Cluster{Pods: []policy.Pod{pod(1), pod(2, "to")}, Policies: named},
			[2]bool{true, true}, [2]int{2, 2},
		},
		{
			"labels that open both",
			policy.Cluster{Pods: []policy.Pod{pod(1), pod(2)}, Policies: named},
			policy.Cluster{Pods: []policy.Pod{pod(1, "from"), pod(2, "to")}, Policies: named},
			[2]bool{}, [2]int{0, 0},
		},
		{
			"isolation in both directions",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(3, in, 80, 80)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(3, in, 80, 80), peers(1, in), peers(2, out)}},
			[2]bool{}, [2]int{2, 2},
		},
		{
			"a pod goes while another moves and another's profile changes",
			policy.Cluster{Pods: []policy.Pod{pod(1, "x"), pod(2, "x"), pod(3), pod(4)}, Policies: []policy.Policy{networkPolicy("ns0", "x", has("x"), in, from("from"))}},
			policy.Cluster{Pods: []policy.Pod{pod(2, "x"), pod(3), pod(4, "from")}, Policies: []policy.Policy{networkPolicy("ns0", "x", has("x"), in, from("from")), peers(3, in)}},
			[2]bool{}, [2]int{1, 2},
		},
		{
			"isolation, egress of another closes, and a pod loses its label",
			policy.Cluster{Pods: []policy.Pod{pod(1), pod(2), pod(3), pod(4, "from")}, Policies: []policy.Policy{peers(2, in, from("from")), peers(3, out, policy.Rule{})}},
			policy.Cluster{Pods: pods[:4], Policies: []policy.Policy{peers(1, in), peers(2, in, from("from")), peers(3, out)}},
			[2]bool{}, [2]int{2, 2},
		},
		{
			"isolation ends, and egress of another opens",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in), ports(3, out, 80, 80)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(3, out, 80, 81)}},
			[2]bool{}, [2]int{1, 1},
		},
		{
			"isolation that begins in one and ends in the other",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(2, out)}},
			[2]bool{true, true}, [2]int{1, 1},
		},
		{
			"its end",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(3, in, 80, 80), peers(1, in), peers(2, out)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{ports(3, in, 80, 80)}},
			[2]bool{}, [2]int{0, 0},
		},
		{
			"a pod that comes isolated, while egress of another opens",
			policy.Cluster{Pods: pods[1:], Policies: []policy.Policy{peers(1, in), peers(2, out)}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in), peers(2, out, policy.Rule{})}},
			[2]bool{false, true}, [2]int{2, 2},
		},
		{
			"a pod that goes and was isolated, while egress of another closes",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in), peers(2, out, policy.Rule{})}},
			policy.Cluster{Pods: pods[1:], Policies: []policy.Policy{peers(1, in), peers(2, out)}},
			[2]bool{}, [2]int{1, 1},
		},
		{
			"a pod that comes is allowed, while egress of another closes",
			policy.Cluster{Pods: []policy.Pod{pod(2), pod(3)}, Policies: []policy.Policy{peers(2, in, from("from")), peers(3, out, policy.Rule{})}},
			policy.Cluster{Pods: []policy.Pod{pod(1, "from"), pod(2), pod(3)}, Policies: []policy.Policy{peers(2, in, from("from")), peers(3, out)}},
			[2]bool{false, true}, [2]int{1, 2},
		},
		{
			"a pod moves while the profile of another changes",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in, from("from"))}},
			policy.Cluster{Pods: []policy.Pod{pod(1), pod(2), pod(3), pod(4, "from"), pod(5)}, Policies: []policy.Policy{peers(1, in, from("from")), peers(3, in)}},
			[2]bool{}, [2]int{1, 1},
		},
		{
			"a fresh profile knows a pod by its new label, while egress of another changes",
			policy.Cluster{Pods: []policy.Pod{pod(1, "a"), pod(2), pod(3)}, Policies: []policy.Policy{peers(2, in, from("a"), from("c")), ports(3, out, 80, 80)}},
			policy.Cluster{Pods: []policy.Pod{pod(1, "c"), pod(2), pod(3)}, Policies: []policy.Policy{peers(2, in, from("a"), from("c"), from("b")), ports(3, out, 81, 81)}},
			[2]bool{}, [2]int{2, 1},
		},
		{
			"a block goes",
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in), peers(1, out, block(other.String()))}},
			policy.Cluster{Pods: pods, Policies: []policy.Policy{peers(1, in), peers(1, out)}},
			[2]bool{}, [2]int{1, 0},
		},
		{
			"a block that held a pod, and ingress that opens",
			policy.Cluster{Pods: pods[:2], Policies: []policy.Policy{peers(2, out, block(one.String())), peers(1, in)}},
			policy.Cluster{Pods: pods[:2], Policies: []policy.Policy{peers(2, out, block(other.String())), peers(1, in, policy.Rule{})}},
			[2]bool{true, true}, [2]int{3, 3},
		},
	} {
		for adopt, name := range []string{"events", "adoption"} {
			f := newFollower(0, policytest.Options{})
			f.flows = 100
			f.flow = func(*policy.Cluster) policy.Flow {
				from := f.r.IntN(4)
				return policy.Flow{Src: policytest.Address(1+from, false), Dst: policytest.Address(1+(from+1+f.r.IntN(3))%4, false), Protocol: policy.TCP, Port: uint16(80 + f.r.IntN(3))}
			}
			if err := f.follow(f.e.Replace(&tc.was)); err != nil {
				t.Fatalf("%s: %v", tc.name, err)
			}
			if adopt == 1 {
				f.e = newEngine(0)
				f.e.Adopt(maps.Clone(f.tables))
			}
			d := f.e.Replace(&tc.is)
			profiles := 0
			for _, step := range d.Steps {
				for _, op := range step {
					if op.Map == policy.AccessOthers && !op.Delete {
						profiles++
					}
				}
			}
			if d.Pause > 0 != tc.pause[adopt] || profiles != tc.profiles[adopt] {
				t.Errorf("%s, %s: pause %d, %d fresh profiles, want %v and %d", tc.name, name, d.Pause, profiles, tc.pause[adopt], tc.profiles[adopt])
			}
			if err := f.follow(d); err != nil {
				t.Fatalf("%s, %s: %v", tc.name, name, err)
			}
			if err := f.compare(); err != nil {
				t.Fatalf("%s, %s: %v", tc.name, name, err)
			}
		}
	}
}

// TestOneHistoryOneDelta: many profiles that look at one pod are gone through in one
// order whatever that of Go's maps is.
func TestOneHistoryOneDelta(t *testing.T) {
	s := policytest.Shape{Pods: 12, Namespaces: 1, Local: 10}
	c := s.Cluster()
	for i := range 10 {
		c.Pods[i].Labels = policy.MakeLabels(map[string]string{"pod": fmt.Sprint(i)})
		subject := policy.Selector{Requirements: []policy.Requirement{{Key: "pod", Values: []string{fmt.Sprint(i)}}}}
		c.Policies = append(c.Policies, networkPolicy("ns0", fmt.Sprint(i), subject, policy.Ingress, policy.Rule{
			Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "team", Values: []string{"red"}}}}}}},
			Ports: []policy.PortMatch{{Protocol: policy.TCP, First: uint16(1000 + i), Last: uint16(1000 + i)}},
		}))
	}
	red := c.Pods[11]
	red.Labels = policy.MakeLabels(map[string]string{"team": "red"})
	first := ""
	for range 4 {
		e := policy.NewEngine("here")
		d := fmt.Sprint(e.Replace(c), e.Apply(policy.Event{Pod: &red}), e.Apply(policy.Event{Pod: &c.Pods[11]}))
		if first == "" {
			first = d
		}
		if d != first {
			t.Fatalf("two engines with one history give different deltas:\n%s\n%s", first, d)
		}
	}
}

// TestMovesAndTurns: pods change labels that are seen by profiles some pods keep and
// others leave.
func TestMovesAndTurns(t *testing.T) {
	with := func(r policy.Rule, p []policy.PortMatch) policy.Rule {
		r.Ports = p
		return r
	}
	in := func(name, subject string, rules ...policy.Rule) policy.Policy {
		return networkPolicy("ns0", name, has(subject), policy.Ingress, rules...)
	}
	isolate := networkPolicy("ns0", "isolate", has("pod3"), policy.Egress)
	local := func(i int, labels ...string) policy.Pod { return labelledPod(0, i, labels...) }
	remote := func(i int, labels ...string) policy.Pod { return labelledPod(1, i, labels...) }
	was := policy.Cluster{
		Pods: []policy.Pod{local(1, "x"), local(2, "y"), local(3, "z"), remote(4, "a"), remote(5, "a", "b")},
	}
	for _, tc := range []struct {
		name     string
		policies []policy.Policy
		events   []policy.Event
		revokes  bool
		same     [2]int // pods that have one identity at the end
	}{
		{
			"a profile in use that allows both",
			[]policy.Policy{in("p", "x", from("a"), from("b")), in("q", "y", from("b"), from("a")), in("s", "z", from("b"))},
			[]policy.Event{{Pod: ptr(local(1, "y"))}, {Pod: ptr(remote(4, "b"))}},
			false, [2]int{},
		},
		{
			"a meet that must know who moves",
			[]policy.Policy{
				in("p", "x", with(from("a"), tcp(80, 81)), with(from("b"), tcp(80, 81))),
				in("q", "y", with(from("a"), tcp(81, 82)), with(from("b"), tcp(81, 82))), in("s", "z", from("b")),
			},
			[]policy.Event{{Pod: ptr(local(1, "y"))}, {Pod: ptr(remote(4, "b"))}, {Policy: &isolate}},
			true, [2]int{},
		},
		{
			"a meet with a profile that knows nobody",
			[]policy.Policy{in("p", "x", from("a")), in("q", "y", policy.Rule{Ports: tcp(80, 80)}), in("s", "z", from("c"))},
			[]policy.Event{{Pod: ptr(local(1, "y"))}, {Pod: ptr(remote(4, "c"))}, {Policy: &isolate}},
			true, [2]int{},
		},
		{
			"a fresh profile that does not know who moves",
			[]policy.Policy{in("p", "x", from("a"), from("c")), in("s", "z", from("c"))},
			[]policy.Event{{Policy: ptr(in("p", "x", from("a")))}, {Pod: ptr(remote(4, "c"))}},
			true, [2]int{},
		},
		{
			"labels that mean the same",
			[]policy.Policy{in("p", "x", from("a"), from("b")), in("q", "y", from("c"))},
			[]policy.Event{{Pod: ptr(local(2, "x"))}, {Pod: ptr(remote(4, "a", "b"))}},
			false, [2]int{4, 5},
		},
	} {
		f := newFollower(0, policytest.Options{})
		f.flow = func(*policy.Cluster) policy.Flow {
			return policy.Flow{Src: policytest.Address(4, false), Dst: policytest.Address(1+f.r.IntN(3), false), Protocol: policy.TCP, Port: uint16(80 + f.r.IntN(3))}
		}
		was.Policies = tc.policies
		if err := f.follow(f.e.Replace(&was)); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		d := f.e.Apply(tc.events...)
		if d.Revokes != tc.revokes {
			t.Errorf("%s: revokes %v", tc.name, d.Revokes)
		}
		if err := f.follow(d); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		identity := func(i int) uint32 {
			return f.tables[policy.Key{Map: policy.PodID, Addr: policytest.Address(i, false)}]
		}
		if a, b := identity(tc.same[0]), identity(tc.same[1]); a != b {
			t.Errorf("%s: identities %x and %x", tc.name, a, b)
		}
		if err := f.compare(); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestSettle: identities of pods and ranges wait for the drop of a profile that packets
// may still hold, and nothing else does.
func TestSettle(t *testing.T) {
	in := func(name, subject string, rules ...policy.Rule) *policy.Policy {
		return ptr(networkPolicy("ns0", name, has(subject), policy.Ingress, rules...))
	}
	retire := []policy.Event{{Policy: in("x", "pod1"), Delete: true}}
	for _, tc := range []struct {
		name   string
		deltas [][]policy.Event
		want   []bool
	}{
		{"after an adoption", [][]policy.Event{retire, {{Pod: ptr(labelledPod(1, 2, "b"))}}, {{Pod: ptr(labelledPod(1, 2, "a"))}}}, []bool{false, true, false}},
		{"a pod moves", [][]policy.Event{{{Pod: ptr(labelledPod(1, 2, "b"))}}}, []bool{false}},
		{"after a profile went", [][]policy.Event{retire, {{Pod: ptr(labelledPod(1, 2, "b"))}}, {{Pod: ptr(labelledPod(1, 2, "a"))}}}, []bool{false, true, false}},
		{"a pod moves while a profile goes", [][]policy.Event{{retire[0], {Pod: ptr(labelledPod(1, 2, "b"))}}, {{Pod: ptr(labelledPod(1, 3, "a"))}}}, []bool{true, true}},
		{"a pod comes after a profile went", [][]policy.Event{retire, {{Pod: ptr(labelledPod(1, 4, "a"))}}, {{Pod: ptr(labelledPod(1, 4, "b"))}}}, []bool{false, false, true}},
		{"a range is cut after a profile went", [][]policy.Event{retire, {{Policy: in("y", "pod1", block("10.9.1.0/24"))}}}, []bool{false, true}},
		{"a range comes after a profile went", [][]policy.Event{retire, {{Policy: in("y", "pod1", block("10.8.1.0/24"))}}}, []bool{false, false}},
		{"a pod comes in a range after a profile went", [][]policy.Event{{{Policy: in("y", "pod1", block("10.1.0.0/24"))}}, {{Pod: ptr(labelledPod(1, 3, "c"))}}, retire, {{Pod: ptr(labelledPod(1, 4, "a"))}}}, []bool{false, true, false, true}},
		{"two waits", [][]policy.Event{retire, {{Pod: ptr(labelledPod(1, 2, "b"))}, {Policy: in("x", "pod1")}}, {{Pod: ptr(labelledPod(1, 2, "a"))}}}, []bool{false, true, true}},
	} {
		f := newFollower(1, policytest.Options{})
		f.flows = 0
		err := f.follow(f.e.Replace(&policy.Cluster{
			Pods:     []policy.Pod{labelledPod(0, 1), labelledPod(1, 2, "a"), labelledPod(1, 3, "b")},
			Policies: []policy.Policy{*in("p", "pod1", from("a"), block("10.9.0.0/16")), *in("q", "pod1", from("b")), *in("x", "pod1", policy.Rule{Ports: tcp(7, 7)})},
		}))
		if err != nil {
			t.Fatal(err)
		}
		for i, evs := range tc.deltas {
			var d policy.Delta
			if i == 0 && strings.Contains(tc.name, "adoption") {
				f.e.Apply(evs...)
				c := f.e.Cluster()
				f.e = newEngine(1)
				f.e.Adopt(maps.Clone(f.tables))
				d = f.e.Replace(c)
			} else {
				d = f.e.Apply(evs...)
			}
			if d.Settle != tc.want[i] {
				t.Errorf("%s: delta %d settles: %v", tc.name, i, d.Settle)
			}
			if err := f.follow(d); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestAdoptKeepsElements: an address that has an element has one until Tidy, for a packet
// may have looked for its range already.
func TestAdoptKeepsElements(t *testing.T) {
	f := newFollower(1, policytest.Options{})
	f.flows = 0
	c := policy.Cluster{
		Pods:     []policy.Pod{labelledPod(0, 1), labelledPod(1, 2, "a")},
		Policies: []policy.Policy{networkPolicy("ns0", "p", has("pod1"), policy.Ingress, from("a"))},
	}
	if err := f.follow(f.e.Replace(&c)); err != nil {
		t.Fatal(err)
	}
	f.e = newEngine(1)
	f.e.Adopt(maps.Clone(f.tables))
	c.Pods = c.Pods[:1]
	if err := f.follow(f.e.Replace(&c)); err != nil {
		t.Fatal(err)
	}
	element := policy.Key{Map: policy.PodID, Addr: policytest.Address(2, false)}
	if _, ok := f.tables[element]; !ok {
		t.Error("the element of a pod that is gone went before Tidy")
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
	if _, ok := f.tables[element]; ok {
		t.Error("the element of a pod that is gone stays after Tidy")
	}
}
