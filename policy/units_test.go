package policy

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func TestNumbers(t *testing.T) {
	list := func(v ...uint32) func(func(uint32)) {
		return func(yield func(uint32)) {
			for _, n := range v {
				yield(n)
			}
		}
	}
	take := func(n *numbers, count int) (out []uint32) {
		for range count {
			out = append(out, n.next())
		}
		return out
	}
	small := func() *numbers { return &numbers{first: 5, last: 9, used: map[uint32]struct{}{}} }
	for _, tc := range []struct {
		name string
		n    *numbers
		do   func(n *numbers) []uint32
		want []uint32
	}{
		{"in order", small(), func(n *numbers) []uint32 { return take(n, 5) }, []uint32{5, 6, 7, 8, 9}},
		{"freed ones come after all others", small(), func(n *numbers) []uint32 {
			take(n, 3)
			n.free(6)
			return take(n, 3)
		}, []uint32{8, 9, 6}},
		{"above those avoided", small(), func(n *numbers) []uint32 {
			take(n, 2)
			n.avoid(list(6, 7))
			return take(n, 3)
		}, []uint32{8, 9, 5}},
		{"avoided below the range and above", small(), func(n *numbers) []uint32 {
			n.avoid(list(1, 77, 6))
			return take(n, 3)
		}, []uint32{5, 7, 8}},
		{"only those kept are taken", small(), func(n *numbers) []uint32 {
			take(n, 5)
			n.keep(list(5, 7, 8))
			return take(n, 2)
		}, []uint32{6, 9}},
		{"bits that stay clear", &numbers{first: 0x10001, last: 0x30000, clear: 0xc000, cur: 0x13ffe, used: map[uint32]struct{}{0x20000: {}}},
			func(n *numbers) []uint32 { return take(n, 2) }, []uint32{0x13fff, 0x20001}},
		{"the first number above bits that stay clear", &numbers{first: 0x10001, last: 0x30000, clear: 0xc000, cur: 0x13fff, used: map[uint32]struct{}{}},
			func(n *numbers) []uint32 { return take(n, 2) }, []uint32{0x20000, 0x20001}},
		{"the end of a range with clear bits", &numbers{first: 0x10001, last: 0x13fff, clear: 0xc000, cur: 0x13ffe, used: map[uint32]struct{}{0x10001: {}}},
			func(n *numbers) []uint32 { return take(n, 2) }, []uint32{0x13fff, 0x10002}},
		{"clear bits are skipped past the end", &numbers{first: 0x10001, last: 0x14fff, clear: 0xc000, cur: 0x13fff, used: map[uint32]struct{}{}},
			func(n *numbers) []uint32 { return take(n, 1) }, []uint32{0x10001}},
	} {
		if got := tc.do(tc.n); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %x, want %x", tc.name, got, tc.want)
		}
	}
	n := NewEngine("").ingressNumbers
	for v, want := range map[uint32]bool{n.first - 1: false, n.first: true, n.first | 0x4000: false, n.first | 0x8000: false, n.last: true, n.last + 1: false} {
		if n.valid(v) != want {
			t.Errorf("valid(%x) = %v", v, !want)
		}
	}
}

// randomClass draws a class, and what it says port by port.
func randomClass(e *Engine, r *rand.Rand) (*class, func(Protocol, int) uint8) {
	var codes [2][16]uint8
	rest := uint8(1 + r.IntN(4))
	for p := range codes {
		code := rest
		for i := range codes[p] {
			if r.IntN(3) == 0 {
				code = []uint8{rest, uint8(1 + r.IntN(4))}[r.IntN(2)]
			}
			codes[p][i] = code
		}
	}
	port := func(i int) uint16 { // the first and the last eight
		if i < 8 {
			return uint16(i)
		}
		return uint16(65520 + i)
	}
	var spans []span
	for p, protocol := range []Protocol{TCP, UDP} {
		for i, c := range codes[p] {
			spans = appendSpan(spans, span{protocol, port(i), port(i), c}, rest)
		}
	}
	return e.internClass(rest, spans), func(p Protocol, n int) uint8 {
		i := slices.Index([]Protocol{TCP, UDP}, p)
		switch {
		case i >= 0 && n < 8:
			return codes[i][n]
		case i >= 0 && n >= 65528:
			return codes[i][n-65520]
		}
		return rest
	}
}

func TestClassesPortByPort(t *testing.T) {
	e, r := NewEngine(""), rand.New(rand.NewPCG(1, 1))
	ports := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1000, 65527, 65528, 65529, 65530, 65531, 65532, 65533, 65534, 65535}
	covers := 0
	for range 400 {
		a, atA := randomClass(e, r)
		b, atB := randomClass(e, r)
		m := e.meet(a, b)
		if !shortly(a) || !shortly(m) {
			t.Fatalf("not written shortly: %v or %v", a, m)
		}
		all := true
		for _, p := range []Protocol{TCP, UDP, SCTP} {
			for _, n := range ports {
				ca, cb := atA(p, n), atB(p, n)
				if got := a.code(p, uint16(n)); got != ca {
					t.Fatalf("%v: %s %d is %d, want %d", a, p, n, got, ca)
				}
				all = all && (allows(cb) || !allows(ca))
				want := cb
				if allows(cb) && !allows(ca) {
					want = ca
				}
				if got := m.code(p, uint16(n)); got != want {
					t.Fatalf("meet of %v and %v: %s %d is %d, want %d", a, b, p, n, got, want)
				}
			}
		}
		if got := e.covers(b, a); got != all {
			t.Fatalf("%v covers %v: %v", b, a, got)
		}
		if !e.covers(a, m) || !e.covers(b, m) {
			t.Fatalf("the meet %v of %v and %v allows more than they do", m, a, b)
		}
		if all {
			covers++
		}
	}
	if covers < 10 {
		t.Errorf("only %d of 400 pairs cover", covers)
	}
	for _, tc := range []struct {
		name string
		a, b *class
		want bool
	}{
		{"one port more", e.internClass(2, []span{{TCP, 80, 80, 1}}), e.internClass(2, []span{{TCP, 80, 81, 1}}), true},
		{"one port less", e.internClass(2, []span{{TCP, 80, 81, 1}}), e.internClass(2, []span{{TCP, 80, 80, 1}}), false},
		{"all, or all but one", e.internClass(1, nil), e.internClass(1, []span{{TCP, 80, 80, 2}}), false},
		{"all but one, or all", e.internClass(1, []span{{TCP, 80, 80, 2}}), e.internClass(1, nil), true},
		{"nothing, or all", e.internClass(2, nil), e.internClass(1, nil), true},
		{"all, or nothing", e.internClass(1, nil), e.internClass(2, nil), false},
		{"logged or not", e.internClass(1, nil), e.internClass(3, nil), true},
	} {
		if got := e.covers(tc.b, tc.a); got != tc.want {
			t.Errorf("%s: covers %v", tc.name, got)
		}
	}
}

// counts is how many of what an engine remembers for some rules.
func counts(rules ...Rule) (atoms, bodies, walks int) {
	e := NewEngine("here")
	c := &Cluster{Pods: []Pod{{Name: Name{"ns", "pod"}, Node: "here", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}}
	for i, r := range rules {
		c.Policies = append(c.Policies, Policy{
			ID: PolicyID{Kind: "NetworkPolicy", Name: Name{"ns", fmt.Sprint(i)}}, Tier: Tier(100 + i), Applies: [2]bool{true, false},
			Subject: PodSelector{Namespace: "ns"}, Rules: [2][]Rule{{r}},
		})
	}
	e.Replace(c)
	return len(e.atoms), len(e.bodies), len(e.walks)
}

// TestSameIsOne: rules that say the same share what is computed for them, and rules that
// do not never do.
func TestSameIsOne(t *testing.T) {
	requirement := func(key string, op Operator, values ...string) Requirement { return Requirement{key, op, values} }
	pods := func(r ...Requirement) Peer { return Peer{Pods: &PodSelector{Namespace: "ns", Pods: Selector{r}}} }
	spaces := func(namespaces, pods []Requirement) Peer {
		return Peer{Pods: &PodSelector{Namespaces: Selector{namespaces}, Pods: Selector{pods}}}
	}
	block := func(cidr string, except ...string) Peer {
		b := &Block{CIDR: netip.MustParsePrefix(cidr)}
		for _, x := range except {
			b.Except = append(b.Except, netip.MustParsePrefix(x))
		}
		return Peer{Block: b}
	}
	a, b := requirement("a", In, "x"), requirement("b", Exists)
	port := func(p Protocol, first, last uint16) PortMatch {
		return PortMatch{Protocol: p, First: first, Last: last}
	}
	named := func(name string) PortMatch { return PortMatch{Protocol: TCP, Name: name} }
	for _, tc := range []struct {
		name          string
		one, two      Rule
		atoms, bodies int
	}{
		{"peers in another order", Rule{Peers: []Peer{pods(a), pods(b)}}, Rule{Peers: []Peer{pods(b), pods(a)}}, 1, 1},
		{"a peer twice", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{pods(a), pods(a)}}, 1, 1},
		{"another peer", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{pods(b)}}, 2, 1},
		{"requirements in another order", Rule{Peers: []Peer{pods(a, b)}}, Rule{Peers: []Peer{pods(b, a)}}, 1, 1},
		{"a requirement twice", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{pods(a, a)}}, 1, 1},
		{"another operator", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{pods(requirement("a", NotIn, "x"))}}, 2, 1},
		{"two values or one", Rule{Peers: []Peer{pods(requirement("a", In, "x", "y"))}}, Rule{Peers: []Peer{pods(requirement("a", In, "xy"))}}, 2, 1},
		{"key or value", Rule{Peers: []Peer{pods(requirement("a", In, "x"))}}, Rule{Peers: []Peer{pods(requirement("ax", In, ""))}}, 2, 1},
		{"two requirements or one", Rule{Peers: []Peer{pods(b, requirement("c", Exists))}}, Rule{Peers: []Peer{pods(requirement("b", Exists, "c\x042"))}}, 2, 1},
		{"of namespaces or of pods", Rule{Peers: []Peer{spaces([]Requirement{a}, nil)}}, Rule{Peers: []Peer{spaces(nil, []Requirement{a})}}, 2, 1},
		{"of namespaces and pods", Rule{Peers: []Peer{spaces([]Requirement{a}, []Requirement{b})}}, Rule{Peers: []Peer{spaces([]Requirement{a, b}, nil)}}, 2, 1},
		{"a namespace or all", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{spaces(nil, []Requirement{a})}}, 2, 1},
		{"a namespace with a name like a selector", Rule{Peers: []Peer{{Pods: &PodSelector{Namespace: "a\x042\x03"}}}}, Rule{Peers: []Peer{{Pods: &PodSelector{Namespaces: Selector{[]Requirement{requirement("a", Exists)}}}}}}, 2, 1},
		{"excepts in another order", Rule{Peers: []Peer{block("10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/24", "10.2.0.0/16")}}, Rule{Peers: []Peer{block("10.0.0.0/8", "10.2.0.0/16", "10.1.0.0/24", "10.1.0.0/16", "10.1.0.0/16")}}, 1, 1},
		{"without except", Rule{Peers: []Peer{block("10.0.0.0/8")}}, Rule{Peers: []Peer{block("10.0.0.0/8", "10.1.0.0/16")}}, 2, 1},
		{"ports in another order", Rule{Ports: []PortMatch{port(TCP, 1, 2), named("x")}}, Rule{Ports: []PortMatch{named("x"), port(TCP, 1, 2)}}, 0, 2}, // and the resolved one
		{"a port twice", Rule{Ports: []PortMatch{port(TCP, 1, 2)}}, Rule{Ports: []PortMatch{port(TCP, 1, 2), port(TCP, 1, 2)}}, 0, 1},
		{"every port, written or not", Rule{}, Rule{Ports: []PortMatch{port(AnyProtocol, 0, 65535)}}, 0, 1},
		{"another first port", Rule{Ports: []PortMatch{port(TCP, 1, 2)}}, Rule{Ports: []PortMatch{port(TCP, 2, 2)}}, 0, 2},
		{"another last port", Rule{Ports: []PortMatch{port(TCP, 1, 2)}}, Rule{Ports: []PortMatch{port(TCP, 1, 3)}}, 0, 2},
		{"another protocol", Rule{Ports: []PortMatch{port(TCP, 1, 2)}}, Rule{Ports: []PortMatch{port(UDP, 1, 2)}}, 0, 2},
		{"ports or not these ports", Rule{Ports: []PortMatch{port(TCP, 1, 2)}}, Rule{NotPorts: []PortMatch{port(TCP, 1, 2)}}, 0, 2},
		{"another action", Rule{}, Rule{Action: Deny}, 0, 2},
		{"logged", Rule{}, Rule{Log: true}, 0, 2},
		{"none excluded, or some", Rule{Peers: []Peer{pods(a)}}, Rule{Peers: []Peer{pods(a)}, NotPeers: []Peer{pods(b)}}, 2, 1},
	} {
		atoms, bodies, _ := counts(tc.one, tc.two)
		if atoms != tc.atoms || bodies != tc.bodies {
			t.Errorf("%s: %d peer groups and %d bodies, want %d and %d", tc.name, atoms, bodies, tc.atoms, tc.bodies)
		}
	}
}

// TestNamesResolve: what a rule with names does depends on which of them has the number.
func TestNamesResolve(t *testing.T) {
	e := NewEngine("")
	b := e.internBody(Allow, false, []PortMatch{{Protocol: TCP, Name: "a"}, {Protocol: TCP, Name: "b"}, {Protocol: TCP, Name: "a"}}, []PortMatch{{Protocol: TCP, Name: "c"}})
	if want := []portName{{"a", TCP}, {"b", TCP}, {"c", TCP}}; !slices.Equal(b.names, want) {
		t.Errorf("names %v, want %v", b.names, want)
	}
	number := func(name string, port uint16) namedPort { return namedPort{portName{name, TCP}, TCP, port} }
	for _, tc := range []struct {
		named           []namedPort
		ports, notPorts []PortMatch
	}{
		{nil, []PortMatch{}, []PortMatch{}},
		{[]namedPort{number("a", 80)}, []PortMatch{{TCP, 80, 80, ""}, {TCP, 80, 80, ""}}, []PortMatch{}},
		{[]namedPort{number("b", 80)}, []PortMatch{{TCP, 80, 80, ""}}, []PortMatch{}},
		{[]namedPort{number("c", 80)}, []PortMatch{}, []PortMatch{{TCP, 80, 80, ""}}},
		{[]namedPort{number("a", 1), number("c", 80)}, []PortMatch{{TCP, 1, 1, ""}, {TCP, 1, 1, ""}}, []PortMatch{{TCP, 80, 80, ""}}},
		{[]namedPort{number("a", 81)}, []PortMatch{{TCP, 81, 81, ""}, {TCP, 81, 81, ""}}, []PortMatch{}},
	} {
		r := e.resolve(b, tc.named)
		same := func(a, b []PortMatch) bool {
			return reflect.DeepEqual(slices.Compact(slices.Clone(a)), slices.Compact(slices.Clone(b)))
		}
		if !same(r.ports, tc.ports) || !same(r.notPorts, tc.notPorts) {
			t.Errorf("%v: ports %v not %v, want %v not %v", tc.named, r.ports, r.notPorts, tc.ports, tc.notPorts)
		}
		if again := testing.AllocsPerRun(5, func() { e.resolve(b, tc.named) }); again > 0 {
			t.Errorf("resolving again allocates %v times", again)
		}
	}
	if n := len(e.bodies); n != 6 {
		t.Errorf("%d bodies, want 6", n)
	}
}

func TestWalkOrder(t *testing.T) {
	e := NewEngine("")
	allow := func(port uint16) uint32 {
		return e.internBody(Allow, false, []PortMatch{{TCP, port, port, ""}}, nil).id
	}
	deny := e.internBody(Deny, false, nil, nil).id
	a, b := allow(1), allow(2)
	for _, tc := range []struct {
		name       string
		walk, want []uint32
		start      int
	}{
		{"only allows are sorted", []uint32{b, a, b}, []uint32{a, b}, 0},
		{"with a deny the order counts", []uint32{b, deny, a}, []uint32{b, deny, a}, 0},
		{"the tiers before are left alone", []uint32{b, a, tierEnds, b, a}, []uint32{b, a, tierEnds, a, b}, 3},
	} {
		if got := e.canonicalTier(slices.Clone(tc.walk), tc.start); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	if !e.bodyByID[a].plain() || e.bodyByID[deny].plain() || e.internBody(Allow, true, nil, nil).plain() {
		t.Error("plain bodies are those that allow without a log")
	}
}

// sample is an engine with a local pod and two remote ones that its policies name.
func sample() *Engine {
	e := NewEngine("here")
	pod := func(i int, node string) Pod {
		return Pod{Name: Name{"ns", fmt.Sprint("pod", i)}, Node: node, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})},
			Labels: MakeLabels(map[string]string{"app": fmt.Sprint(i)}), Ports: []NamedPort{{"http", TCP, 80}}}
	}
	policy := func(name string, d Direction, ports ...PortMatch) Policy {
		p := Policy{ID: PolicyID{"NetworkPolicy", Name{"ns", name}}, Tier: TierNamespaced, Isolates: true, Subject: PodSelector{Namespace: "ns"}}
		p.Applies[d] = true
		p.Rules[d] = []Rule{{Peers: []Peer{{Pods: &PodSelector{Namespace: "ns", Pods: Selector{[]Requirement{{"app", In, []string{"2"}}}}}}}, Ports: ports}}
		return p
	}
	e.Replace(&Cluster{
		Pods:     []Pod{pod(1, "here"), pod(2, "there"), pod(3, "there")},
		Policies: []Policy{policy("a", Ingress, PortMatch{TCP, 80, 80, ""}), policy("b", Ingress, PortMatch{TCP, 90, 99, ""}), policy("c", Egress, PortMatch{TCP, 0, 0, "http"})},
	})
	return e
}

// TestNothingIsComputedTwice: what was computed before costs no allocation.
func TestNothingIsComputedTwice(t *testing.T) {
	e := sample()
	for r := range e.locals {
		for _, p := range r.prof {
			for _, o := range e.addresses {
				full, _ := e.sign(o, true)
				if n := testing.AllocsPerRun(20, func() { e.classify(p, full) }); n > 0 {
					t.Errorf("classify allocates %v times", n)
				}
			}
		}
	}
	for _, o := range e.addresses {
		ports := float64(len(e.relevantPorts(o.owner, o.owner.group.atoms, true)))
		if n := testing.AllocsPerRun(20, func() { e.sign(o, true) }); n > ports {
			t.Errorf("sign allocates %v times, with %v ports", n, ports)
		}
	}
	r := rand.New(rand.NewPCG(1, 1))
	a, _ := randomClass(e, r)
	b, _ := randomClass(e, r)
	e.covers(a, b)
	if n := testing.AllocsPerRun(20, func() { e.covers(a, b) }); n > 0 {
		t.Errorf("covers allocates %v times", n)
	}
	atoms := e.lastAtom
	for range 3 {
		for _, p := range e.Cluster().Policies {
			e.Apply(Event{Policy: &p, Delete: true})
			e.Tidy()
			e.Apply(Event{Policy: &p})
		}
	}
	if e.lastAtom != atoms {
		t.Errorf("numbers of peer groups grow from %d to %d", atoms, e.lastAtom)
	}
}

// TestElementsAndComments is what people see of a small table.
func TestElementsAndComments(t *testing.T) {
	e := sample()
	maps, comments := map[Map]int{}, map[Map]string{}
	e.elements(func(el Element) {
		maps[el.Map]++
		comments[el.Map] = el.Comment
	})
	if maps[AccessPort] != 2 || maps[AccessRange] != 1 || maps[AccessRest] != 3 || maps[Access] != 2 || maps[AccessOthers] != 2 {
		t.Errorf("elements %v", maps)
	}
	if comments[IngressProfile] != "ns/pod1" || comments[PodID] != "ns/pod2" || comments[IsolatedEgress] != "ns/pod1" {
		t.Errorf("comments %v", comments)
	}
	for _, p := range e.profiles {
		if want := [2]string{"ns/a ns/b", "ns/c"}[p.dir]; p.comment() != want {
			t.Errorf("comment %q, want %q", p.comment(), want)
		}
	}
}

func TestRangesThatReplaceEachOther(t *testing.T) {
	ranged := func(remove bool, from, to byte) Op {
		a := func(b byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, b}) }
		return Op{Delete: remove, Element: Element{Key: Key{Map: NetID, Addr: a(from), To: a(to)}}}
	}
	del := func(from, to byte) Op { return ranged(true, from, to) }
	add := func(from, to byte) Op { return ranged(false, from, to) }
	for _, tc := range []struct {
		name  string
		limit int
		ops   []Op
		want  [][]Op
	}{
		{"none", 2, nil, nil},
		{"apart, two by two", 2, []Op{add(7, 8), add(1, 2), add(5, 6), add(3, 4), add(9, 9)}, [][]Op{{add(1, 2), add(3, 4)}, {add(5, 6), add(7, 8)}, {add(9, 9)}}},
		{"a range and its pieces", 2, []Op{del(1, 9), add(1, 4), add(5, 9), add(10, 10)}, [][]Op{{del(1, 9), add(1, 4), add(5, 9)}, {add(10, 10)}}},
		{"a range that grows over its neighbour", 2, []Op{del(1, 4), del(5, 9), add(1, 9)}, [][]Op{{del(1, 4), del(5, 9), add(1, 9)}}},
		{"a chain", 2, []Op{del(1, 4), add(3, 6), del(5, 8), add(8, 9), add(10, 11)}, [][]Op{{del(1, 4), del(5, 8), add(3, 6), add(8, 9)}, {add(10, 11)}}},
		{"a long one over short ones", 2, []Op{del(1, 9), add(2, 3), add(6, 7), add(9, 9)}, [][]Op{{del(1, 9), add(2, 3), add(6, 7), add(9, 9)}}},
		{"as many as fit", 3, []Op{del(1, 2), add(1, 2), add(4, 4), add(6, 6)}, [][]Op{{del(1, 2), add(1, 2), add(4, 4)}, {add(6, 6)}}},
	} {
		var d Delta
		d.addRanges(tc.limit, tc.ops)
		if !reflect.DeepEqual(d.Steps, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, d.Steps, tc.want)
		}
	}
}

func TestOpposition(t *testing.T) {
	for _, tc := range []struct {
		closes, opens [2]bool
		want          bool
	}{
		{[2]bool{true, true}, [2]bool{}, false},
		{[2]bool{}, [2]bool{true, true}, false},
		{[2]bool{true, false}, [2]bool{true, false}, false},
		{[2]bool{false, true}, [2]bool{false, true}, false},
		{[2]bool{true, false}, [2]bool{false, true}, true},
		{[2]bool{false, true}, [2]bool{true, false}, true},
	} {
		if got := (opposition{tc.closes, tc.opens}).any(); got != tc.want {
			t.Errorf("closes %v, opens %v: %v", tc.closes, tc.opens, got)
		}
		var o opposition
		for range 2 {
			for _, d := range Directions {
				o.note(d, tc.closes[d], tc.opens[d])
				o.note(d, false, false)
			}
		}
		if want := (opposition{tc.closes, tc.opens}); o != want {
			t.Errorf("noted %+v, want %+v", o, want)
		}
	}
}

// TestProfilesAreShared: pods that the same policies select have one profile, for egress
// whatever their own ports are, for ingress when the names mean the same.
func TestProfilesAreShared(t *testing.T) {
	e := sample()
	for i, ports := range [][]NamedPort{{{"http", TCP, 80}}, {{"http", TCP, 81}}, {{"other", TCP, 80}}, nil} {
		e.Apply(Event{Pod: &Pod{Name: Name{"ns", fmt.Sprint("local", i)}, Node: "here", Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})}, Ports: ports}})
	}
	count := func() (n [2]int) {
		for _, p := range e.profiles {
			n[p.dir]++
		}
		return n
	}
	if n := count(); n != [2]int{1, 1} {
		t.Errorf("%v profiles, want one a direction", n)
	}
	named := Policy{ID: PolicyID{"NetworkPolicy", Name{"ns", "named"}}, Tier: TierNamespaced, Isolates: true, Subject: PodSelector{Namespace: "ns"}, Applies: [2]bool{true, false}}
	named.Rules[Ingress] = []Rule{{Ports: []PortMatch{{TCP, 0, 0, "http"}}}}
	e.Apply(Event{Policy: &named})
	if n := count(); n != [2]int{3, 1} {
		t.Errorf("%v profiles, want 80, 81 and none for ingress", n)
	}
}

// TestPolicyChangesInPart: a direction keeps its profile only when nothing of it changes.
func TestPolicyChangesInPart(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Policy)
		kept   [2]bool
	}{
		{"generation", func(p *Policy) { p.Generation++ }, [2]bool{true, true}},
		{"tier", func(p *Policy) { p.Tier = TierAdmin }, [2]bool{}},
		{"order", func(p *Policy) { p.Order = 5 }, [2]bool{}},
		{"isolates", func(p *Policy) { p.Isolates = false }, [2]bool{}},
		{"ingress rules", func(p *Policy) { p.Rules[Ingress] = nil }, [2]bool{false, true}},
		{"egress rules", func(p *Policy) { p.Rules[Egress] = nil }, [2]bool{true, false}},
		{"directions", func(p *Policy) { p.Applies[Egress] = false }, [2]bool{true, false}},
	} {
		e := sample()
		p := Policy{ID: PolicyID{"NetworkPolicy", Name{"ns", "a"}}, Tier: TierNamespaced, Isolates: true, Subject: PodSelector{Namespace: "ns"}, Applies: [2]bool{true, true}}
		p.Rules = [2][]Rule{{{Ports: []PortMatch{{TCP, 1, 1, ""}}}}, {{Ports: []PortMatch{{TCP, 2, 2, ""}}}}}
		e.Apply(Event{Policy: &p})
		profiles := func() (n [2]uint32) {
			for r := range e.locals {
				for _, d := range Directions {
					n[d] = r.prof[d].num
				}
			}
			return n
		}
		was := profiles()
		q := p // what was handed over is the engine's
		tc.change(&q)
		e.Apply(Event{Policy: &q})
		is := profiles()
		for _, d := range Directions {
			if (was[d] == is[d]) != tc.kept[d] {
				t.Errorf("%s: %s profile %x to %x", tc.name, d, was[d], is[d])
			}
		}
		if want := Compile(e.Cluster(), "here").Tables; Canonical(want) != Canonical(e.Tables()) {
			e.Tidy()
			if Canonical(want) != Canonical(e.Tables()) {
				t.Errorf("%s: tables differ from those made from scratch", tc.name)
			}
		}
	}
}

// TestPortsInAnyOrder: the order in which a pod lists its ports makes no other identity.
func TestPortsInAnyOrder(t *testing.T) {
	e := sample()
	rule := Policy{ID: PolicyID{"NetworkPolicy", Name{"ns", "d"}}, Tier: TierNamespaced, Isolates: true, Subject: PodSelector{Namespace: "ns"}, Applies: [2]bool{false, true}}
	rule.Rules[Egress] = []Rule{{Ports: []PortMatch{{TCP, 0, 0, "b"}, {TCP, 0, 0, "a"}, {AnyProtocol, 0, 0, "a"}}}}
	e.Apply(Event{Policy: &rule})
	var ids []*identity
	for i, ports := range [][]NamedPort{{{"a", TCP, 1}, {"b", TCP, 2}}, {{"b", TCP, 2}, {"a", TCP, 1}}, {{"b", TCP, 2}, {"a", TCP, 1}, {"a", TCP, 1}}} {
		addr := netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
		e.Apply(Event{Pod: &Pod{Name: Name{"ns", fmt.Sprint("many", i)}, Node: "there", Addrs: []netip.Addr{addr}, Ports: ports}})
		ids = append(ids, e.addresses[addr].id)
	}
	if _, ok := (&pod{Pod: &Pod{}}).resolve(portName{"a", TCP}); ok {
		t.Error("a pod without ports has a number for a name")
	}
	if ids[0] == nil || ids[0] != ids[1] || ids[0] != ids[2] {
		t.Errorf("identities %v", ids)
	}
}

// TestFreedNumbersOfPeerGroups: the last one too is used again.
func TestFreedNumbersOfPeerGroups(t *testing.T) {
	e := NewEngine("")
	e.lastAtom, e.freeAtoms = 2, []uint32{1}
	for _, want := range []uint32{1, 3, 4} {
		if got := e.atomID(); got != want {
			t.Errorf("number %d, want %d", got, want)
		}
	}
}

func TestFindRange(t *testing.T) {
	a := netip.MustParseAddr
	ranges := []rangeValue{{a("10.0.0.4"), a("10.0.0.9"), 4}, {a("10.0.1.0"), a("10.0.1.0"), 5}, {a("fd00::1"), a("fd00::f"), 6}}
	for addr, want := range map[string]uint32{
		"10.0.0.3": 0, "10.0.0.4": 4, "10.0.0.9": 4, "10.0.0.10": 0, "10.0.1.0": 5, "10.0.1.1": 0, "::": 0, "fd00::": 0, "fd00::1": 6, "fd00::f": 6, "fd00::10": 0,
	} {
		if v, ok := findRange(ranges, a(addr)); v != want || ok != (want != 0) {
			t.Errorf("%s: %d, %v, want %d", addr, v, ok, want)
		}
	}
}

// TestAdoptedClasses: a number outside of its range is not kept, and content that the
// engine has none of is one class, however often it is asked for.
func TestAdoptedClasses(t *testing.T) {
	e := sample()
	kernel := Tables{}
	for k, v := range e.Tables() {
		switch k.Map {
		case AccessPort, AccessRange, AccessRest:
			k.X -= ClassFirst
		case Access, AccessOthers:
			v -= ClassFirst
		}
		kernel[k] = v
	}
	kernel[Key{Map: AccessRest, X: ClassFirst + 99}] = 3
	f := NewEngine("here")
	a := &adoption{e: f, kernel: kernel, spans: map[uint32][]span{}, classes: map[string]uint32{}, rows: map[uint32]map[uint32]uint32{7: {8: ClassFirst + 99}}, contents: map[uint32]*class{}}
	if x, y := a.class(7, 8), a.class(7, 8); x != y {
		t.Error("a class of the kernel is made twice")
	}
	f.Adopt(kernel)
	f.Replace(e.Cluster())
	for _, c := range f.classes {
		if !f.classNumbers.valid(c.num) {
			t.Errorf("class %x", c.num)
		}
	}
}

// TestTidyForgets: what rules did, and classes that nothing came to use, take no memory.
func TestTidyForgets(t *testing.T) {
	e := sample()
	unused := e.internClass(2, []span{{TCP, 7, 7, 1}})
	e.Apply()
	if e.classes[unused.key] != nil {
		t.Error("a class that nothing uses is remembered")
	}
	for i, p := range e.Cluster().Policies {
		e.Apply(Event{Policy: &p, Delete: true})
		e.Tidy()
		if n := 2 - i; len(e.bodies) != n || len(e.bodyByID) != n || len(e.walks) != 0 {
			t.Errorf("%d bodies, %d numbers and %d walks for %d rules", len(e.bodies), len(e.bodyByID), len(e.walks), n)
		}
	}
}

// TestBuckets: a selector is filed under the rarest thing it demands.
func TestBuckets(t *testing.T) {
	one := Selector{[]Requirement{{"a", In, []string{"x"}}}}
	for _, tc := range []struct {
		s    PodSelector
		want string
	}{
		{PodSelector{}, ""},
		{PodSelector{Namespace: "ns"}, "nns"},
		{PodSelector{Namespace: "ns", Pods: one}, "Nns\x00a\x00x"},
		{PodSelector{Pods: one}, "pa\x00x"},
		{PodSelector{Namespaces: one}, "la\x00x"},
		{PodSelector{Namespaces: one, Pods: one}, "la\x00x"},
		{PodSelector{Pods: Selector{[]Requirement{{"a", In, []string{"x", "y"}}}}}, ""},
		{PodSelector{Pods: Selector{[]Requirement{{"a", NotIn, []string{"x"}}}}}, ""},
		{PodSelector{Pods: Selector{[]Requirement{{"b", Exists, nil}, {"a", In, []string{"x"}}}}}, "pa\x00x"},
	} {
		if got := bucket(&tc.s); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.s, got, tc.want)
		}
	}
}
