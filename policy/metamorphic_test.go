package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

func TestShuffledInputCompilesToTheSameTables(t *testing.T) {
	for seed := range effort(25, 80, 80, 1000) {
		c := policytest.New(seed, policytest.Options{Tiers: seed%2 == 0}).Cluster()
		want := policy.Compile(c, policytest.Node(0))
		s := &policy.Cluster{
			Namespaces: slices.Clone(c.Namespaces), Pods: slices.Clone(c.Pods), Nodes: slices.Clone(c.Nodes), Policies: slices.Clone(c.Policies),
		}
		r := rand.New(rand.NewPCG(seed, 2))
		r.Shuffle(len(s.Namespaces), func(i, j int) { s.Namespaces[i], s.Namespaces[j] = s.Namespaces[j], s.Namespaces[i] })
		r.Shuffle(len(s.Pods), func(i, j int) { s.Pods[i], s.Pods[j] = s.Pods[j], s.Pods[i] })
		r.Shuffle(len(s.Policies), func(i, j int) { s.Policies[i], s.Policies[j] = s.Policies[j], s.Policies[i] })
		got := policy.Compile(s, policytest.Node(0))
		if !reflect.DeepEqual(want, got) {
			diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }))
			t.Fatalf("seed %d: sorted (-), shuffled (+):\n%s", seed, diff)
		}
	}
}

// networkPolicy is a policy of NetworkPolicy's kind for one direction.
func networkPolicy(ns, name string, subject policy.Selector, d policy.Direction, rules ...policy.Rule) policy.Policy {
	p := policy.Policy{
		ID:   policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: ns, Name: name}},
		Tier: policy.TierNamespaced, Isolates: true, Subject: policy.PodSelector{Namespace: ns, Pods: subject},
	}
	p.Applies[d] = true
	p.Rules[d] = rules
	return p
}

func TestAddingOnlyOpensOrOnlyCloses(t *testing.T) {
	for seed := range effort(25, 80, 80, 1000) {
		g := policytest.New(seed, policytest.Options{})
		c := g.Cluster()
		e := policy.NewEngine(policytest.Node(0))
		e.Replace(c)
		i := slices.IndexFunc(c.Policies, func(p policy.Policy) bool { return p.Applies[policy.Ingress] })
		more := c.Policies[i]
		more.Rules[policy.Ingress] = append(slices.Clone(more.Rules[policy.Ingress]), policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{}}}})
		before := e.Tables().Index()
		if d := e.Apply(policy.Event{Policy: &more}); d.Revokes {
			t.Errorf("seed %d: an added rule revokes", seed)
		}
		after := e.Tables().Index()
		isolate := networkPolicy("ns0", "isolate", policy.Selector{}, policy.Egress)
		e.Apply(policy.Event{Policy: &isolate})
		closed := e.Tables().Index()
		for range 300 {
			f := g.Flow(c)
			b, a, z := policy.DecideWith(before, f).Allowed, policy.DecideWith(after, f).Allowed, policy.DecideWith(closed, f).Allowed
			if b && !a {
				t.Errorf("seed %d: an added rule closes %+v", seed, f)
			}
			if z && !a {
				t.Errorf("seed %d: isolation opens %+v", seed, f)
			}
		}
		if d := e.Apply(policy.Event{Delete: true, Policy: &isolate}); d.Revokes {
			t.Errorf("seed %d: the end of an isolation revokes", seed)
		}
	}
}

// rename gives every namespace and label value another name, consistently.
func rename(c *policy.Cluster) *policy.Cluster {
	labels := func(l policy.Labels) policy.Labels {
		m := map[string]string{}
		for k, v := range l.All() {
			m["x-"+k] = "y-" + v
		}
		return policy.MakeLabels(m)
	}
	selector := func(s policy.Selector) policy.Selector {
		var out policy.Selector
		for _, r := range s.Requirements {
			n := policy.Requirement{Key: "x-" + r.Key, Op: r.Op}
			for _, v := range r.Values {
				n.Values = append(n.Values, "y-"+v)
			}
			out.Requirements = append(out.Requirements, n)
		}
		return out
	}
	namespace := func(n string) string {
		if n == "" {
			return ""
		}
		return "z-" + n
	}
	pods := func(s policy.PodSelector) policy.PodSelector {
		return policy.PodSelector{Namespace: namespace(s.Namespace), Namespaces: selector(s.Namespaces), Pods: selector(s.Pods)}
	}
	peers := func(in []policy.Peer) []policy.Peer {
		out := slices.Clone(in)
		for i, p := range out {
			if p.Pods != nil {
				s := pods(*p.Pods)
				out[i].Pods = &s
			}
		}
		return out
	}
	out := &policy.Cluster{Nodes: c.Nodes}
	for _, n := range c.Namespaces {
		out.Namespaces = append(out.Namespaces, policy.Namespace{Name: namespace(n.Name), Labels: labels(n.Labels)})
	}
	for _, p := range c.Pods {
		p.Namespace, p.Labels = namespace(p.Namespace), labels(p.Labels)
		out.Pods = append(out.Pods, p)
	}
	for _, p := range c.Policies {
		p.ID.Namespace, p.Subject = namespace(p.ID.Namespace), pods(p.Subject)
		for _, d := range policy.Directions {
			p.Rules[d] = slices.Clone(p.Rules[d])
			for i := range p.Rules[d] {
				p.Rules[d][i].Peers, p.Rules[d][i].NotPeers = peers(p.Rules[d][i].Peers), peers(p.Rules[d][i].NotPeers)
			}
		}
		out.Policies = append(out.Policies, p)
	}
	return out
}

func TestRenamingChangesNothing(t *testing.T) {
	for seed := range effort(25, 80, 80, 1000) {
		c := policytest.New(seed, policytest.Options{Tiers: seed%2 == 0}).Cluster()
		want, got := policy.Compile(c, policytest.Node(0)).Tables, policy.Compile(rename(c), policytest.Node(0)).Tables
		if !maps.Equal(want, got) {
			t.Fatalf("seed %d: renaming namespaces and labels changes the tables", seed)
		}
	}
}

// twin maps a v4 cluster's addresses into v6.
func twin(a netip.Addr) netip.Addr {
	b := a.As4()
	return netip.AddrFrom16([16]byte{0xfd, 0x77, 12: b[0], 13: b[1], 14: b[2], 15: b[3]})
}

func TestFamiliesAreTwins(t *testing.T) {
	prefix := func(p netip.Prefix) netip.Prefix { return netip.PrefixFrom(twin(p.Addr()), 96+p.Bits()) }
	for seed := range effort(25, 80, 80, 1000) {
		g := policytest.New(seed, policytest.Options{Tiers: seed%2 == 0})
		c, six := g.Cluster(), &policy.Cluster{}
		six.Namespaces = c.Namespaces
		for i := range c.Pods {
			c.Pods[i].Addrs = slices.DeleteFunc(c.Pods[i].Addrs, netip.Addr.Is6)
			p := c.Pods[i]
			p.Addrs = nil
			for _, a := range c.Pods[i].Addrs {
				p.Addrs = append(p.Addrs, twin(a))
			}
			six.Pods = append(six.Pods, p)
		}
		for _, p := range c.Policies {
			for _, d := range policy.Directions {
				p.Rules[d] = slices.Clone(p.Rules[d])
				for i, r := range p.Rules[d] {
					p.Rules[d][i].Peers, p.Rules[d][i].NotPeers = twinPeers(r.Peers, prefix), twinPeers(r.NotPeers, prefix)
				}
			}
			six.Policies = append(six.Policies, p)
		}
		a, b := policy.Compile(c, policytest.Node(0)).Tables.Index(), policy.Compile(six, policytest.Node(0)).Tables.Index()
		for range 300 {
			f := g.Flow(c)
			if f.Src.Is6() {
				continue
			}
			got, want := policy.DecideWith(b, policy.Flow{Src: twin(f.Src), Dst: twin(f.Dst), Protocol: f.Protocol, Port: f.Port}), policy.DecideWith(a, f)
			if got.Allowed != want.Allowed {
				t.Fatalf("seed %d: %+v: v4 allowed=%v, v6 allowed=%v", seed, f, want.Allowed, got.Allowed)
			}
		}
	}
}

// twinPeers maps v4 blocks to v6; v6 blocks, which no v4 address is in, to one no twin is in.
func twinPeers(in []policy.Peer, prefix func(netip.Prefix) netip.Prefix) []policy.Peer {
	out := slices.Clone(in)
	for i, p := range out {
		if p.Block == nil {
			continue
		}
		b := policy.Block{CIDR: netip.MustParsePrefix("2001:db8:ffff::/64")}
		if p.Block.CIDR.Addr().Is4() {
			b.CIDR = prefix(p.Block.CIDR)
			for _, e := range p.Block.Except {
				b.Except = append(b.Except, prefix(e))
			}
		}
		out[i].Block = &b
	}
	return out
}

// TestDeltasAreMinimal counts ops: they depend on what changed, not on what there is.
func TestDeltasAreMinimal(t *testing.T) {
	sizes := []policytest.Shape{{Pods: 1000, Policies: 500, Namespaces: 50, Local: 50}, {Pods: 50000, Policies: 500, Namespaces: 50, Local: 50}}
	if testing.Short() {
		sizes = sizes[:1]
	}
	all := policy.Selector{}
	app := func(v string) policy.Selector {
		return policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{v}}}}
	}
	for _, s := range sizes {
		t.Run(s.String(), func(t *testing.T) {
			c := s.Cluster()
			everyone := networkPolicy("ns0", "everyone", all, policy.Ingress, policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: app("app1")}}}})
			c.Policies = append(c.Policies, everyone)
			e := policy.NewEngine("here")
			e.Replace(c)
			remote, local := s.Pod(s.Pods-1), s.Pod(0)
			remote.Labels = policy.MakeLabels(map[string]string{"app": "app1"})
			relabelled := remote
			relabelled.Labels = policy.MakeLabels(map[string]string{"app": "app3", "release": "new"})
			isolate := networkPolicy("ns0", "isolate", all, policy.Egress)
			nobody := networkPolicy("ns0", "nobody", app("none"), policy.Ingress)
			for _, step := range []struct {
				name string
				ev   policy.Event
				max  int
			}{
				{"remote pod becomes a peer", policy.Event{Pod: &remote}, 3},
				{"remote pod is a peer no more", policy.Event{Pod: &relabelled}, 2},
				{"remote pod is one again", policy.Event{Pod: &remote}, 2},
				{"remote pod goes", policy.Event{Pod: &remote, Delete: true}, 1},
				{"remote pod comes", policy.Event{Pod: &remote}, 1},
				{"local pod goes", policy.Event{Pod: &local, Delete: true}, 5},
				{"local pod comes", policy.Event{Pod: &local}, 5},
				{"policy that selects no pod", policy.Event{Policy: &nobody}, 0},
				{"policy goes", policy.Event{Policy: &nobody, Delete: true}, 0},
				{"policy isolates the local pods of a namespace", policy.Event{Policy: &isolate}, 5 * s.Local},
				{"and goes", policy.Event{Policy: &isolate, Delete: true}, 5 * s.Local},
			} {
				d := e.Apply(step.ev)
				if n := opsOf(d); n > step.max {
					t.Errorf("%s: %d ops, want at most %d", step.name, n, step.max)
				}
				if step.name == "local pod comes" && len(d.Steps) != 1 || d.Settle || d.Pause != 0 {
					t.Errorf("%s: %d steps, settle %v, pause %d", step.name, len(d.Steps), d.Settle, d.Pause)
				}
			}
		})
	}
}

func opsOf(d policy.Delta) int {
	n := 0
	for _, s := range d.Steps {
		n += len(s)
	}
	return n
}

// TestSplitOfHalfThePods bounds the steps of the worst case: a selector that halves a class.
func TestSplitOfHalfThePods(t *testing.T) {
	f := newFollower(1, policytest.Options{})
	f.flows = 0
	pods := int(effort(2000, 20000, 20000, 20000))
	longest := pods / 10
	policy.SetMaxStep(f.e, longest)
	s := policytest.Shape{Pods: pods, Policies: 0, Namespaces: 10, Local: 0}
	c := s.Cluster()
	for i := range c.Pods {
		c.Pods[i].Node = policytest.Node(1 + i%2)
		c.Pods[i].Labels = policy.MakeLabels(map[string]string{"app": fmt.Sprint("app", i%4)})
	}
	c.Pods[0].Node = policytest.Node(0)
	c.Policies = []policy.Policy{networkPolicy(c.Pods[0].Namespace, "all", policy.Selector{}, policy.Ingress, policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{}}}})}
	if err := f.follow(f.e.Replace(c)); err != nil {
		t.Fatal(err)
	}
	for _, op := range []policy.Operator{policy.In, policy.NotIn} { // the quarter of app0 moves, then that of app1
		p := networkPolicy(c.Pods[0].Namespace, fmt.Sprint("quarter", op), policy.Selector{}, policy.Ingress, policy.Rule{Peers: []policy.Peer{{
			Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: op, Values: []string{fmt.Sprint("app", op)}}}}},
		}}})
		d := f.e.Apply(policy.Event{Policy: &p})
		if n := opsOf(d); n > pods/2+100 {
			t.Errorf("%d ops for a quarter of %d pods (%v), want a delete and an add for each", n, pods, op)
		}
		if err := f.follow(d); err != nil {
			t.Fatal(err)
		}
		d = f.e.Apply(policy.Event{Policy: &p, Delete: true})
		if err := f.follow(d); err != nil {
			t.Fatal(err)
		}
		if err := f.follow(f.e.Tidy()); err != nil {
			t.Fatal(err)
		}
	}
	half := networkPolicy(c.Pods[0].Namespace, "half", policy.Selector{}, policy.Egress, policy.Rule{Peers: []policy.Peer{{
		Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{"app0", "app2"}}}}},
	}}})
	d := f.e.Apply(policy.Event{Policy: &half})
	for i, step := range d.Steps {
		if len(step) > longest {
			t.Errorf("step %d has %d ops, want at most %d", i, len(step), longest)
		}
	}
	if len(d.Steps) < 10 {
		t.Errorf("%d steps", len(d.Steps))
	}
	if n := opsOf(d); n > pods+100 {
		t.Errorf("%d ops for half of %d pods, want a delete and an add for each", n, pods)
	}
	if err := f.follow(d); err != nil {
		t.Fatal(err)
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
}

// TestManyBlocksInSteps: a policy with thousands of blocks is bounded steps as well, but
// for those blocks that cut one range.
func TestManyBlocksInSteps(t *testing.T) {
	f := newFollower(1, policytest.Options{})
	f.flows = 0
	c := policytest.Shape{Pods: 1, Namespaces: 1}.Cluster()
	c.Pods[0].Node = policytest.Node(0)
	if err := f.follow(f.e.Replace(c)); err != nil {
		t.Fatal(err)
	}
	blocks := func(a byte) policy.Policy {
		var r policy.Rule
		for i := range 3000 {
			r.Peers = append(r.Peers, policy.Peer{Block: &policy.Block{CIDR: netip.PrefixFrom(netip.AddrFrom4([4]byte{a, byte(i >> 8), byte(i), 0}), 26)}})
		}
		return networkPolicy("ns0", fmt.Sprint("blocks", a), policy.Selector{}, policy.Egress, r)
	}
	for _, a := range []byte{20, 30} {
		p := blocks(a)
		d := f.e.Apply(policy.Event{Policy: &p})
		for i, step := range d.Steps {
			if len(step) > 2000 {
				t.Errorf("step %d has %d ops, want at most 2000", i, len(step))
			}
		}
		if err := f.follow(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.compare(); err != nil {
		t.Fatal(err)
	}
}

// TestReusedAddressRevokes: what a pod was allowed must be judged again when its address
// is another's, be it of the same name.
func TestReusedAddressRevokes(t *testing.T) {
	s := policytest.Shape{Pods: 4, Namespaces: 1, Local: 1}
	was := s.Pod(3)
	for name, change := range map[string]func(p *policy.Pod){
		"another UID":  func(p *policy.Pod) { p.UID = "another" },
		"another name": func(p *policy.Pod) { p.Name.Name = "another" },
	} {
		e := policy.NewEngine("here")
		c := s.Cluster()
		c.Policies = []policy.Policy{networkPolicy("ns0", "all", policy.Selector{}, policy.Ingress, policy.Rule{})}
		e.Replace(c)
		is := was
		change(&is)
		if d := e.Apply(policy.Event{Pod: &was, Delete: is.Name != was.Name}, policy.Event{Pod: &is}); !d.Revokes {
			t.Errorf("%s: the delta does not revoke", name)
		}
	}
}

// TestNamesOfOneNumber: two pods whose port 80 has two names are not the same to egress
// rules that use one of the names.
func TestNamesOfOneNumber(t *testing.T) {
	s := policytest.Shape{Pods: 4, Namespaces: 1, Local: 2}
	c := s.Cluster()
	c.Pods[2].Ports = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 80}}
	c.Pods[3].Ports = []policy.NamedPort{{Name: "dns", Protocol: policy.TCP, Port: 80}}
	for i, name := range []string{"http", "dns"} {
		subject := policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{fmt.Sprint("app", i)}}}}
		c.Policies = append(c.Policies, networkPolicy("ns0", name, subject, policy.Egress, policy.Rule{
			Peers: []policy.Peer{{Pods: &policy.PodSelector{Namespace: "ns0"}}}, Ports: []policy.PortMatch{{Protocol: policy.TCP, Name: name}},
		}))
	}
	lookup := policy.Compile(c, "here").Tables.Index()
	for from := range 2 {
		for to := 2; to < 4; to++ {
			f := policy.Flow{Src: c.Pods[from].Addrs[0], Dst: c.Pods[to].Addrs[0], Protocol: policy.TCP, Port: 80}
			if got, want := policy.DecideWith(lookup, f).Allowed, policy.Evaluate(c, "here", f).Allowed; got != want || want != (to == from+2) {
				t.Errorf("pod %d to pod %d: tables %v, oracle %v", from, to, got, want)
			}
		}
	}
}

// TestWhatRevokes: established flows are judged again when one may have lost its
// permission, and only then.
func TestWhatRevokes(t *testing.T) {
	s := policytest.Shape{Pods: 6, Namespaces: 1, Local: 3}
	app := func(v string) policy.Selector {
		return policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{v}}}}
	}
	from := func(v string) policy.Rule {
		return policy.Rule{Peers: []policy.Peer{{Pods: &policy.PodSelector{Pods: app(v)}}}}
	}
	relabelled := func(i int, v string) *policy.Pod {
		p := s.Pod(i)
		p.Labels = policy.MakeLabels(map[string]string{"app": v})
		return &p
	}
	other := s.Pod(4)
	other.UID = "other"
	none := networkPolicy("ns0", "p", policy.Selector{}, policy.Ingress, from("app1"))
	wider := networkPolicy("ns0", "p", policy.Selector{}, policy.Ingress, from("app1"), from("app2"))
	local := s.Pod(0)
	for _, tc := range []struct {
		name     string
		policies []policy.Policy
		ev       policy.Event
		want     bool
	}{
		{"a local pod goes", []policy.Policy{none}, policy.Event{Pod: &local, Delete: true}, true},
		{"a remote pod becomes a peer", []policy.Policy{none}, policy.Event{Pod: relabelled(5, "app1")}, false},
		{"a remote pod is a peer no more", []policy.Policy{none}, policy.Event{Pod: relabelled(1, "app9")}, true},
		{"a rule more", []policy.Policy{none}, policy.Event{Policy: &wider}, false},
		{"a rule less", []policy.Policy{wider}, policy.Event{Policy: &none}, true},
		{"isolation", nil, policy.Event{Policy: &none}, true},
		{"its end", []policy.Policy{none}, policy.Event{Policy: &none, Delete: true}, false},
		{"an address reused", []policy.Policy{none}, policy.Event{Pod: &other}, true},
		{"an address reused without a policy", nil, policy.Event{Pod: &other}, false},
	} {
		c := s.Cluster()
		c.Policies = tc.policies
		e := policy.NewEngine("here")
		e.Replace(c)
		if d := e.Apply(tc.ev); d.Revokes != tc.want {
			t.Errorf("%s: revokes %v", tc.name, d.Revokes)
		}
	}
}

// TestSplitsMoveTheFewer: what a new rule tells apart moves the smaller part of a class.
func TestSplitsMoveTheFewer(t *testing.T) {
	s := policytest.Shape{Pods: 40, Namespaces: 1, Local: 1}
	c := s.Cluster()
	for i := range c.Pods {
		if i > 4 {
			c.Pods[i].Ports = []policy.NamedPort{{Name: "http", Protocol: policy.TCP, Port: 80}}
		}
		if i > 10 {
			c.Pods[i].Labels = policy.MakeLabels(map[string]string{"team": "red"})
		}
	}
	everyone := []policy.Peer{{Pods: &policy.PodSelector{}}}
	block := func(cidr string) []policy.Peer {
		return []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix(cidr)}}}
	}
	red := []policy.Peer{{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "team", Values: []string{"red"}}}}}}}
	app := func(op policy.Operator, v string) []policy.Peer {
		return []policy.Peer{{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: op, Values: []string{v}}}}}}}
	}
	c.Policies = []policy.Policy{networkPolicy("ns0", "everyone", policy.Selector{}, policy.Ingress, policy.Rule{Peers: everyone})}
	for _, tc := range []struct {
		name  string
		rules []policy.Rule
		max   int // elements of addresses and ranges, a change is two
	}{
		{"a name that most have", []policy.Rule{{Peers: everyone, Ports: []policy.PortMatch{{Protocol: policy.TCP, Name: "http"}}}}, 10},
		{"any address, a name that most have", []policy.Rule{{Ports: []policy.PortMatch{{Protocol: policy.TCP, Name: "http"}}}}, 10},
		{"labels that most have", []policy.Rule{{Peers: red}}, 22},
		{"two parts of all", []policy.Rule{{Peers: app(policy.NotIn, "app3")}, {Peers: app(policy.In, "app3")}}, 4},
		{"a block that most are in", []policy.Rule{{Peers: block("10.0.0.0/24")}}, 1},
		{"a block that few are in", []policy.Rule{{Peers: block("10.0.0.8/29")}}, 17},
		{"a block that none is in", []policy.Rule{{Peers: block("10.9.0.0/24")}}, 1},
	} {
		f := newFollower(1, policytest.Options{})
		f.flows = 0
		if err := f.follow(f.e.Replace(c)); err != nil {
			t.Fatal(err)
		}
		p := networkPolicy("ns0", "split", policy.Selector{}, policy.Egress, tc.rules...)
		local := c.Pods[0]
		local.Node = policytest.Node(0)
		if err := f.follow(f.e.Apply(policy.Event{Pod: &local})); err != nil {
			t.Fatal(err)
		}
		d := f.e.Apply(policy.Event{Policy: &p})
		n := 0
		for _, step := range d.Steps {
			for _, op := range step {
				if op.Map == policy.PodID || op.Map == policy.NetID {
					n++
				}
			}
		}
		if n > tc.max {
			t.Errorf("%s: %d elements, want at most %d", tc.name, n, tc.max)
		}
		if err := f.follow(d); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if err := f.compare(); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
	}
}

// TestBlocksAsWritten: a block may be written with bits behind its prefix, and a pod that
// a rule names twice, by labels and by a block, is like one that only the block holds.
func TestBlocksAsWritten(t *testing.T) {
	s := policytest.Shape{Pods: 20, Namespaces: 1, Local: 1}
	c := s.Cluster()
	c.Policies = []policy.Policy{networkPolicy("ns0", "blocks", policy.Selector{}, policy.Ingress, policy.Rule{Peers: []policy.Peer{
		{Block: &policy.Block{CIDR: netip.MustParsePrefix("10.0.0.14/29"), Except: []netip.Prefix{netip.MustParsePrefix("10.0.0.11/31")}}},
		{Pods: &policy.PodSelector{Pods: policy.Selector{Requirements: []policy.Requirement{{Key: "app", Values: []string{"app2", "app4"}}}}}},
	}})}
	tables := policy.Compile(c, "here").Tables
	lookup := tables.Index()
	both := 0
	for _, p := range c.Pods[1:] {
		f := policy.Flow{Src: p.Addrs[0], Dst: c.Pods[0].Addrs[0], Protocol: policy.TCP, Port: 80}
		if got, want := policy.DecideWith(lookup, f).Allowed, policy.Evaluate(c, "here", f).Allowed; got != want {
			t.Errorf("%v: tables %v, oracle %v", f.Src, got, want)
		}
		_, ranged := lookup(policy.Key{Map: policy.NetID, Addr: p.Addrs[0]})
		_, single := lookup(policy.Key{Map: policy.PodID, Addr: p.Addrs[0]})
		if ranged {
			both++
		}
		if ranged && single {
			t.Errorf("%v has an element, and its range says the same", p.Addrs[0])
		}
	}
	if both != 6 {
		t.Errorf("%d pods are in the block, want 6", both)
	}
}
