package nft_test

import (
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
	"github.com/nftcni/nftcni/policy/policytest"
)

// number reads a figure from the environment.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// shop is a cluster in which good may always reach closed and bad may never reach opened, whatever the events of the
// kinds below do.
type shop struct {
	f *flipper
}

func in(key string, values ...string) policy.Selector {
	return policy.Selector{Requirements: []policy.Requirement{{Key: key, Op: policy.In, Values: values}}}
}

func (s shop) pod(app, address, tier string, http uint16) *policy.Pod {
	return &policy.Pod{
		Name: policy.Name{Namespace: "shop", Name: app}, UID: app, Node: policytest.Node(0), Attached: true,
		Labels: policy.MakeLabels(map[string]string{"app": app, "tier": tier}), Addrs: []netip.Addr{addr(address)},
		Ports: []policy.NamedPort{{Name: "http", Protocol: policy.UDP, Port: http}},
	}
}

func (s shop) namespace(team string) *policy.Namespace {
	return &policy.Namespace{Name: "shop", Labels: policy.MakeLabels(map[string]string{"kubernetes.io/metadata.name": "shop", "team": team})}
}

func (s shop) node(n int) *policy.Node {
	return &policy.Node{
		Name:     policytest.Node(1),
		Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{192, 168, 0, byte(10 + n)}), netip.MustParseAddr("fd01::" + strconv.Itoa(10+n))},
		PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 20, byte(n), 0}), 24)},
	}
}

// change is what the agent sends for events: the engine's delta, and what nodes mean to masquerading and tunnels.
func change(d policy.Delta, events []policy.Event) nft.Change {
	c := nft.Change{Delta: d}
	for _, e := range events {
		if e.Node != nil {
			c.PodNetworks, c.Tunnels = e.Node.PodCIDRs, &nft.Tunnels{Ports: []uint16{4793}, Nodes: e.Node.Addrs}
		}
	}
	return c
}

func ingress(name string, subject policy.Selector, rules ...policy.Rule) *policy.Policy {
	return &policy.Policy{
		ID:   policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: "shop", Name: name}},
		Tier: policy.TierNamespaced, Isolates: true, Subject: policy.PodSelector{Namespace: "shop", Pods: subject},
		Applies: [2]bool{policy.Ingress: true}, Rules: [2][]policy.Rule{policy.Ingress: rules},
	}
}

func from(pods, namespaces policy.Selector) []policy.Peer {
	return []policy.Peer{{Pods: &policy.PodSelector{Namespaces: namespaces, Pods: pods}}}
}

func block(s string) []policy.Peer {
	return []policy.Peer{{Block: &policy.Block{CIDR: netip.MustParsePrefix(s)}}}
}

// extra is the policy that comes, changes and goes. It opens nothing for the streams and, because closed's own policy
// allows good anyway, closes nothing; good becomes isolated for egress by it, and may go anywhere.
func (s shop) extra(port uint16) *policy.Policy {
	p := ingress("extra", in("app", "closed", "opened", "good"), policy.Rule{Peers: from(in("tier", "none"), policy.Selector{}),
		Ports: []policy.PortMatch{{Protocol: policy.UDP, First: port, Last: port + 9}}})
	p.Applies[policy.Egress], p.Rules[policy.Egress] = true, []policy.Rule{{Ports: []policy.PortMatch{{Protocol: policy.UDP, First: port - port%100, Last: 9000}}}, {Peers: from(in("app", "closed"), policy.Selector{})}}
	return p
}

func (s shop) cluster() *policy.Cluster {
	teams := in("team", "red", "blue")
	notBad := policy.Selector{Requirements: []policy.Requirement{{Key: "app", Op: policy.NotIn, Values: []string{"bad"}}}}
	c := &policy.Cluster{
		Namespaces: []policy.Namespace{*s.namespace("red")},
		Nodes:      []policy.Node{{Name: policytest.Node(0), Addrs: []netip.Addr{addr("192.168.0.9"), addr("fd01::9")}}, *s.node(1)},
		Pods: []policy.Pod{
			*s.pod("good", s.f.good, "front", 80), *s.pod("bad", s.f.bad, "front", 80),
			*s.pod("closed", s.f.closed, "back", 80), *s.pod("opened", s.f.opened, "back", 80),
		},
		Policies: []policy.Policy{
			*ingress("closed", in("app", "closed"), policy.Rule{Peers: from(in("app", "good"), teams), Ports: []policy.PortMatch{
				{Protocol: policy.UDP, Name: "http"}, {Protocol: policy.UDP, First: 80, Last: 80}}}),
			*ingress("opened", in("app", "opened"), policy.Rule{Peers: from(notBad, policy.Selector{})}),
			// These tell apart what the events change.
			*ingress("tiers", in("app", "closed"), policy.Rule{Peers: from(in("tier", "front"), in("team", "red")), Ports: []policy.PortMatch{{Protocol: policy.UDP, First: 90, Last: 90}}}),
			*ingress("nodes", in("tier", "back"), policy.Rule{Peers: block("192.168.0.8/29"), Ports: []policy.PortMatch{{Protocol: policy.UDP, Name: "http"}}}),
			*ingress("nodes6", in("tier", "back"), policy.Rule{Peers: block("fd01::/64"), Ports: []policy.PortMatch{{Protocol: policy.TCP, Name: "http"}}}),
		},
	}
	return c
}

// kinds are the events; n counts them.
func (s shop) kinds() map[string]func(n int) []policy.Event {
	pick := func(n int, a, b string) string { return []string{a, b}[n%2] }
	remote := func() *policy.Pod {
		p := s.pod("good", s.f.good, "front", 80)
		p.Name.Name, p.UID, p.Node, p.Attached = "remote", "remote", policytest.Node(1), false
		p.Addrs = []netip.Addr{addr(s.f.good).Next().Next().Next().Next().Next()}
		return p
	}
	return map[string]func(int) []policy.Event{
		"pod label": func(n int) []policy.Event {
			return []policy.Event{{Pod: s.pod("good", s.f.good, pick(n, "middle", "front"), 80)}, {Pod: s.pod("bad", s.f.bad, pick(n, "middle", "front"), 80)}}
		},
		"server label": func(n int) []policy.Event {
			return []policy.Event{{Pod: s.pod("closed", s.f.closed, pick(n, "front", "back"), 80)}, {Pod: s.pod("opened", s.f.opened, pick(n, "front", "back"), 80)}}
		},
		"pod add and delete": func(n int) []policy.Event { return []policy.Event{{Delete: n%2 == 1, Pod: remote()}} },
		"policy create, change and delete": func(n int) []policy.Event {
			return []policy.Event{{Delete: n%3 == 2, Policy: s.extra([]uint16{8000, 8100, 8100}[n%3])}}
		},
		"namespace relabel": func(n int) []policy.Event { return []policy.Event{{Namespace: s.namespace(pick(n, "blue", "red"))}} },
		"node":              func(n int) []policy.Event { return []policy.Event{{Node: s.node(1 + n%2)}} },
		"named port change": func(n int) []policy.Event {
			port := []uint16{81, 80}[n%2]
			return []policy.Event{{Pod: s.pod("closed", s.f.closed, "back", port)}, {Pod: s.pod("opened", s.f.opened, "back", port)}}
		},
	}
}

// TestKernelNothingFlickers: in no instant of any update is a packet judged by anything but the old or the new policy.
// NFTCNI_FLICKER_UPDATES is the number of updates of each kind (a kind that is fast goes on for 0.5 ms an update),
// NFTCNI_FLICKER_SECONDS ends a kind that is slow before.
func TestKernelNothingFlickers(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for kind := range (shop{f: &flipper{good: "10.9.0.2"}}).kinds() {
			t.Run(map[bool]string{false: "v4/", true: "v6/"}[v6]+kind, func(t *testing.T) {
				w, f := flipWorld(t, v6)
				s := shop{f}
				events, engine := s.kinds()[kind], policy.NewEngine(policytest.Node(0))
				if err := nft.Delete(t.Context(), nft.Options{}); err != nil {
					t.Fatal(err)
				}
				w.table = open(t, nft.Options{})
				r := apply(t, w.table, nft.Change{Delta: engine.Replace(s.cluster()), Bind: bindings(false, w.server, w.client, w.stranger)})
				finish(t, w.table, r)
				n, empty := 0, 0
				flip := flips(t, w.table, func() nft.Change {
					e := events(n)
					c := change(engine.Apply(e...), e)
					if c.Delta.Empty() && c.Tunnels == nil {
						empty++
					}
					n++
					return c
				})
				updates, limit := number(t, "NFTCNI_FLICKER_UPDATES", 100), number(t, "NFTCNI_FLICKER_SECONDS", 3600)
				began, least := time.Now(), time.Duration(updates)*500*time.Microsecond
				lost, leaked := underTraffic(t, w, f, time.Duration(limit)*time.Second, func(i int) bool {
					return (i < updates || time.Since(began) < least) && flip(i)
				})
				t.Logf("%s: %d updates, %d of them without effect; %d wrong", kind, n, empty, lost+leaked)
				if lost != 0 || leaked != 0 {
					t.Errorf("%d allowed packets lost, %d forbidden ones leaked", lost, leaked)
				}
				if empty > n/2 {
					t.Errorf("%d of %d events changed nothing: they prove nothing", empty, n)
				}
			})
		}
	}
}
