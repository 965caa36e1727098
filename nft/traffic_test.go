package nft_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

// Numbers of the hand-written tables below.
const (
	profileWeb = policy.IngressProfileFirst
	idClient   = policy.IdentityFirst
	idOther    = policy.IdentityFirst + 1
	classWeb   = policy.ClassFirst
	classDeny  = policy.ClassFirst + 1
	classAllow = policy.ClassFirst + 2
)

func addr(s string) netip.Addr                { return netip.MustParseAddr(s) }
func at(s string, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr(s), port) }

func put(k policy.Key, v uint32) policy.Op {
	return policy.Op{Element: policy.Element{Key: k, Value: v, Comment: "test/pod"}}
}

func del(k policy.Key) policy.Op { return policy.Op{Delete: true, Element: policy.Element{Key: k}} }

func podID(a string) policy.Key     { return policy.Key{Map: policy.PodID, Addr: addr(a)} }
func ingressOf(a string) policy.Key { return policy.Key{Map: policy.IngressProfile, Addr: addr(a)} }
func egressOf(a string) policy.Key  { return policy.Key{Map: policy.EgressProfile, Addr: addr(a)} }
func isolated(a string) policy.Key  { return policy.Key{Map: policy.IsolatedIngress, Addr: addr(a)} }
func access(profile, id uint32) policy.Key {
	return policy.Key{Map: policy.Access, X: profile, Y: id}
}
func others(profile uint32) policy.Key { return policy.Key{Map: policy.AccessOthers, X: profile} }

// classes are shared by the tests: classWeb allows TCP and UDP 80, 8000-8100, echo requests and nothing else.
func classes() []policy.Op {
	port := func(p policy.Protocol, first uint16) policy.Op {
		return put(policy.Key{Map: policy.AccessPort, X: classWeb, Protocol: p, First: first}, policy.CodeAllow)
	}
	return []policy.Op{
		port(policy.TCP, 80), port(policy.UDP, 80), port(policy.ICMP, 8<<8), port(policy.ICMPv6, 128<<8),
		put(policy.Key{Map: policy.AccessRange, X: classWeb, Protocol: policy.TCP, First: 8000, Last: 8100}, policy.CodeAllow),
		put(policy.Key{Map: policy.AccessRest, X: classWeb}, policy.CodeDeny),
		put(policy.Key{Map: policy.AccessRest, X: classDeny}, policy.CodeDeny),
		put(policy.Key{Map: policy.AccessRest, X: classAllow}, policy.CodeAllow),
	}
}

func bindings(masq bool, pods ...*nfttest.Host) []nft.Binding {
	var out []nft.Binding
	for _, p := range pods {
		for _, a := range p.Addrs {
			out = append(out, nft.Binding{Interface: p.Interface, Addr: a, Masquerade: masq, Comment: "test/" + p.Name})
		}
	}
	return out
}

func apply(t *testing.T, table *nft.Table, c nft.Change) nft.Receipt {
	t.Helper()
	r, err := table.Apply(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func finish(t *testing.T, table *nft.Table, r nft.Receipt) {
	t.Helper()
	if err := nft.Grace(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := table.Finish(context.Background(), r.Seq); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, what string, got, want bool) {
	t.Helper()
	if got != want {
		t.Errorf("%s: passed %v, want %v", what, got, want)
	}
}

// world is a node with a server, a client it allows, a stranger it does not, and a host outside.
type world struct {
	*nfttest.Node
	server, client, stranger, outside *nfttest.Host
	table                             *nft.Table
}

func newWorld(t *testing.T) *world {
	w := &world{Node: nfttest.NewNode(t)}
	w.server = w.Pod("server", "10.9.0.1", "fd09::1")
	w.client = w.Pod("client", "10.9.0.2", "fd09::2")
	w.stranger = w.Pod("stranger", "10.9.0.3", "fd09::3")
	w.outside = w.Outside("outside", "192.0.2.9", "2001:db8::9")
	w.Await(w.server, w.client, w.stranger, w.outside)
	w.table = open(t, nft.Options{})
	ops := classes()
	ops = append(ops, put(others(profileWeb), classDeny), put(access(profileWeb, idClient), classWeb))
	for _, a := range []string{"10.9.0.2", "fd09::2"} {
		ops = append(ops, put(podID(a), idClient))
	}
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		ops = append(ops, put(ingressOf(a), profileWeb), put(isolated(a), 0))
	}
	networks := []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("fd09::/64")}
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}, Bind: bindings(true, w.server, w.client, w.stranger), PodNetworks: networks})
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		for _, port := range []uint16{80, 81, 8050} {
			w.server.EchoTCP(addr(a), port)
			w.server.EchoUDP(addr(a), port)
		}
	}
	return w
}

func TestKernelPolicy(t *testing.T) {
	w := newWorld(t)
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		for _, c := range []struct {
			name      string
			from      *nfttest.Host
			tcp, udp  bool
			other     bool // TCP 81
			rng, ping bool
		}{
			{"allowed client", w.client, true, true, false, true, true},
			{"stranger", w.stranger, false, false, false, false, false},
			{"outside", w.outside, false, false, false, false, false},
			{"own node", &w.Host, true, true, true, true, true},
			{"itself", w.server, true, true, true, true, true},
		} {
			want(t, c.name+" tcp 80 "+a, c.from.TCP(at(a, 80)), c.tcp)
			want(t, c.name+" udp 80 "+a, c.from.UDP(at(a, 80)), c.udp)
			want(t, c.name+" tcp 81 "+a, c.from.TCP(at(a, 81)), c.other)
			want(t, c.name+" tcp 8050 "+a, c.from.TCP(at(a, 8050)), c.rng)
			want(t, c.name+" ping "+a, c.from.Ping(addr(a)), c.ping)
		}
	}
	w.outside.EchoTCP(addr("192.0.2.9"), 80)
	want(t, "server to outside", w.server.TCP(at("192.0.2.9", 80)), true)
	want(t, "server to its node", w.server.Ping(addr("169.254.1.1")), true)
}

func TestKernelRevoke(t *testing.T) {
	w := newWorld(t)
	type live struct{ kept, cut net.Conn }
	var all []live
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		all = append(all, live{w.client.Connect(at(a, 80)), w.client.Connect(at(a, 8050))})
	}
	for i, l := range all {
		want(t, "before, kept "+strconv.Itoa(i), nfttest.Answers(l.kept), true)
		want(t, "before, cut "+strconv.Itoa(i), nfttest.Answers(l.cut), true)
	}
	narrow := classWeb + 10
	steps := [][]policy.Op{
		{
			put(policy.Key{Map: policy.AccessPort, X: narrow, Protocol: policy.TCP, First: 80}, policy.CodeAllow),
			put(policy.Key{Map: policy.AccessRest, X: narrow}, policy.CodeDeny),
			put(access(profileWeb+1, idClient), narrow), put(others(profileWeb+1), classDeny),
		},
		{
			del(ingressOf("10.9.0.1")), put(ingressOf("10.9.0.1"), profileWeb+1),
			del(ingressOf("fd09::1")), put(ingressOf("fd09::1"), profileWeb+1),
		},
	}
	drops := []policy.Op{del(access(profileWeb, idClient)), del(others(profileWeb))}
	r := apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: steps, Drops: drops, Revokes: true}})
	for i, l := range all {
		want(t, "after, cut "+strconv.Itoa(i), nfttest.Answers(l.cut), false)
		want(t, "after, kept "+strconv.Itoa(i), nfttest.Answers(l.kept), true)
	}
	finish(t, w.table, r)
	for i, l := range all {
		want(t, "finished, kept "+strconv.Itoa(i), nfttest.Answers(l.kept), true)
		want(t, "finished, cut "+strconv.Itoa(i), nfttest.Answers(l.cut), false)
	}
	s, err := w.table.State(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := s.Tables[others(profileWeb)]; ok {
		t.Error("the drops are still there")
	}
}

func TestKernelUnbind(t *testing.T) {
	w := newWorld(t)
	c := w.client.Connect(at("10.9.0.1", 80))
	want(t, "before", nfttest.Answers(c), true)
	w.stranger.EchoUDP(addr("10.9.0.3"), 7)
	want(t, "stranger receives", w.client.UDP(at("10.9.0.3", 7)), true)
	r := apply(t, w.table, nft.Change{Unbind: bindings(true, w.client, w.stranger)})
	want(t, "established flow of an unbound address", nfttest.Answers(c), false)
	want(t, "new flow of an unbound address", w.client.TCP(at("10.9.0.1", 80)), false)
	want(t, "unbound address sends to its node", w.client.Ping(addr("169.254.1.1")), false)
	want(t, "unbound address receives from its node", w.UDP(at("10.9.0.3", 7)), false)
	want(t, "unbound address receives from outside", w.outside.UDP(at("10.9.0.3", 7)), false)
	finish(t, w.table, r)
	unheard(t, w, "10.9.0.3", "fd09::3")
	apply(t, w.table, nft.Change{Bind: bindings(true, w.client, w.stranger)})
	want(t, "bound again", w.client.TCP(at("10.9.0.1", 80)), true)
	want(t, "stranger receives again", w.UDP(at("10.9.0.3", 7)), true)
}

// seconds is how long a test under traffic runs.
func seconds(t *testing.T) time.Duration {
	s := 5
	if v := os.Getenv("NFTCNI_FLIP_SECONDS"); v != "" {
		var err error
		if s, err = strconv.Atoi(v); err != nil {
			t.Fatalf("NFTCNI_FLIP_SECONDS: %v", err)
		}
	}
	return time.Duration(s) * time.Second
}

// rate is how many packets a second each stream tries to send.
func rate(t *testing.T) int {
	v := os.Getenv("NFTCNI_FLIP_RATE")
	if v == "" {
		return 6000
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		t.Fatalf("NFTCNI_FLIP_RATE: %v", err)
	}
	return n
}

// flipper repoints the profiles of two servers and the identities of two clients, everything under fresh numbers.
// The first server allows nobody but the good client, the second everybody but the bad one: for it a miss opens.
type flipper struct {
	good, bad, closed, opened string
	n                         uint32
}

func (f *flipper) numbers(n uint32) (good, bad, closed, opened uint32) {
	id, p := policy.IdentityFirst+2*n, policy.IngressProfileFirst+2*(n%8000)
	return id, id + 1, p, p + 1
}

// initial is the state before the first flip.
func (f *flipper) initial() []policy.Op {
	g, b, c, o := f.numbers(0)
	ops := append(classes(), put(podID(f.good), g), put(podID(f.bad), b), put(ingressOf(f.closed), c), put(ingressOf(f.opened), o),
		put(isolated(f.closed), 0), put(isolated(f.opened), 0), put(others(c), classDeny), put(others(o), classAllow))
	return append(ops, put(access(c, g), classWeb), put(access(o, b), classDeny))
}

func (f *flipper) next() policy.Delta {
	g, b, c, o := f.numbers(f.n)
	f.n++
	g2, b2, c2, o2 := f.numbers(f.n)
	change := func(k policy.Key, v uint32) []policy.Op { return []policy.Op{del(k), put(k, v)} }
	prepare := []policy.Op{
		put(others(c2), classDeny), put(others(o2), classAllow),
		put(access(c2, g2), classWeb), put(access(o2, b2), classDeny),
		put(access(c2, g), classWeb), put(access(o2, b), classDeny),
		put(access(c, g2), classWeb), put(access(o, b2), classDeny),
	}
	identities := append(change(podID(f.good), g2), change(podID(f.bad), b2)...)
	profiles := append(change(ingressOf(f.closed), c2), change(ingressOf(f.opened), o2)...)
	drops := []policy.Op{
		del(others(c)), del(others(o)), del(access(c, g)), del(access(o, b)),
		del(access(c2, g)), del(access(o2, b)), del(access(c, g2)), del(access(o, b2)),
	}
	return policy.Delta{Steps: [][]policy.Op{prepare, identities, profiles}, Drops: drops}
}

func (f *flipper) change() nft.Change { return nft.Change{Delta: f.next()} }

// underTraffic floods good -> closed and bad -> opened while change is called over and over, and returns how many
// allowed packets were lost and how many forbidden ones got through.
func underTraffic(t *testing.T, w *world, f *flipper, limit time.Duration, change func(n int) bool) (lost, leaked int64) {
	t.Helper()
	nfttest.Sysctl(t, "net/netfilter/nf_conntrack_udp_timeout", "1")
	good, bad := w.client, w.stranger
	allowed, forbidden := w.server.Sink(addr(f.closed), 80), w.outsidePod(t, f.opened).Sink(addr(f.opened), 80)
	stop := make(chan struct{})
	var sent [2]int64
	var wg sync.WaitGroup
	for i, s := range []struct {
		from *nfttest.Host
		to   string
	}{{good, f.closed}, {bad, f.opened}} {
		wg.Go(func() {
			var err error
			if sent[i], err = s.from.Flood(at(s.to, 80), rate(t), stop); err != nil {
				t.Error(err)
			}
		})
	}
	began, n := time.Now(), 0
	for time.Since(began) < limit && change(n) {
		n++
	}
	close(stop)
	wg.Wait()
	took := time.Since(began).Seconds()
	lost, leaked = sent[0]-allowed.Total(), forbidden.Total()
	if ours := int64(denied(t, addr(f.good), addr(f.closed))); ours != lost {
		// Overload of the machine loses packets too (a full backlog, a full conntrack table): that is no decision.
		t.Logf("%d packets were lost, %d of them denied; losses elsewhere:\n%s", lost, ours, losses(t))
		lost = ours
	}
	t.Logf("%d changes in %.1f s; allowed: %.0f/s, %d sent, %d lost; forbidden: %.0f/s, %d sent, %d leaked",
		n, took, float64(sent[0])/took, sent[0], lost, float64(sent[1])/took, sent[1], leaked)
	return lost, leaked
}

// losses shows where else packets were dropped.
func losses(t *testing.T) string {
	var b strings.Builder
	for _, f := range []string{"/proc/net/softnet_stat", "/proc/net/stat/nf_conntrack", "/proc/sys/net/netfilter/nf_conntrack_max", "/proc/sys/net/netfilter/nf_conntrack_count"} {
		data, err := os.ReadFile(f)
		fmt.Fprintf(&b, "%s %v\n%s", f, err, data)
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return b.String()
	}
	for _, line := range strings.Split(runNft(t, "list", "ruleset"), "\n") {
		if strings.Contains(line, "counter packets") && !strings.Contains(line, "packets 0 ") {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

// denied is how many packets from src to dst the table dropped: a loss that is not among them is the machine's.
func denied(t *testing.T, src, dst netip.Addr) (n uint64) {
	t.Helper()
	reader, err := nft.NewReader(context.Background(), nft.Options{})
	if errors.Is(err, nft.ErrNoTable) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	all, err := reader.Denials(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range all {
		if d.Src == src && d.Dst == dst {
			n += d.Packets
		}
	}
	return n
}

// outsidePod attaches one more server pod.
func (w *world) outsidePod(t *testing.T, a string) *nfttest.Host {
	t.Helper()
	p := w.Pod("opened", a)
	apply(t, w.table, nft.Change{Bind: bindings(false, p)})
	return p
}

// flipWorld is a world whose policy is the flipper's.
func flipWorld(t *testing.T, v6 bool) (*world, *flipper) {
	w := &world{Node: nfttest.NewNode(t)}
	f := &flipper{good: "10.9.0.2", bad: "10.9.0.3", closed: "10.9.0.1", opened: "10.9.0.4"}
	if v6 {
		f = &flipper{good: "fd09::2", bad: "fd09::3", closed: "fd09::1", opened: "fd09::4"}
	}
	w.server, w.client, w.stranger = w.Pod("server", f.closed), w.Pod("client", f.good), w.Pod("stranger", f.bad)
	w.Await(w.server, w.client, w.stranger)
	w.table = open(t, nft.Options{})
	apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{f.initial()}}, Bind: bindings(false, w.server, w.client, w.stranger)})
	return w, f
}

func TestKernelFlipsUnderTraffic(t *testing.T) {
	for _, c := range []struct {
		name string
		v6   bool
	}{{"v4", false}, {"v6", true}} {
		t.Run(c.name, func(t *testing.T) {
			w, f := flipWorld(t, c.v6)
			lost, leaked := underTraffic(t, w, f, seconds(t), flips(t, w.table, f.change))
			if lost != 0 || leaked != 0 {
				t.Errorf("%d allowed packets lost, %d forbidden ones leaked", lost, leaked)
			}
		})
	}
}

// flips changes the policy as fast as it can, while grace periods run beside it as they do in the agent.
func flips(t *testing.T, table *nft.Table, next func() nft.Change) func(int) bool {
	graces := make(chan uint64)
	over := make(chan uint64, 1)
	t.Cleanup(func() { close(graces) })
	go func() {
		for seq := range graces {
			if err := nft.Grace(context.Background()); err != nil {
				t.Error(err)
			}
			over <- seq
		}
	}()
	busy := false
	return func(int) bool {
		r := apply(t, table, next())
		if !busy {
			busy = true
			graces <- r.Seq
		}
		select {
		case seq := <-over:
			busy = false
			if err := table.Finish(context.Background(), seq); err != nil {
				t.Error(err)
				return false
			}
		default:
		}
		return true
	}
}

// TestKernelFlipTestCanFail shows that the test above sees what it looks for.
func TestKernelFlipTestCanFail(t *testing.T) {
	t.Run("without the table", func(t *testing.T) {
		w, f := flipWorld(t, false)
		_, leaked := underTraffic(t, w, f, seconds(t), func(n int) bool {
			if n == 0 {
				if err := nft.Delete(context.Background(), nft.Options{}); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Millisecond) // the packets do the work here
			return n < 500
		})
		if leaked == 0 {
			t.Error("nothing leaked without a table")
		}
	})
	t.Run("stages in one transaction", func(t *testing.T) {
		// Every packet that spans a commit is judged half by the old and half by the new policy: one change in a
		// thousand or two shows it. Apply's waits are left out, which alone is wrong once in 100,000 changes
		// (docs/decisions/0006): the bound stays far below that.
		const bound = 20_000
		n, wrong := 0, false
		for round := 0; round < 6 && n < bound && !wrong; round++ {
			w, f := flipWorld(t, false)
			lost, leaked := underTraffic(t, w, f, seconds(t), func(int) bool {
				r := apply(t, w.table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{inOne(f.next())}}})
				if err := w.table.Finish(context.Background(), r.Seq); err != nil {
					t.Error(err)
				}
				n++
				return n < bound && (n%100 != 0 || denied(t, addr(f.good), addr(f.closed)) == 0)
			})
			wrong = lost+leaked > 0
		}
		t.Logf("stages in one transaction: wrong within %d changes: %v", n, wrong)
		if !wrong {
			t.Error("stages in one transaction were never seen to be wrong: the test above proves nothing")
		}
	})
}

// inOne puts the three stages of a flip into one transaction.
func inOne(d policy.Delta) []policy.Op {
	var one []policy.Op
	for _, s := range append(d.Steps, d.Drops) {
		one = append(one, s...)
	}
	return once(one)
}

// TestKernelSettleAndPause: a delta that asks for it waits, and what earlier deltas owe is deleted then.
func TestKernelSettleAndPause(t *testing.T) {
	namespace(t)
	table := open(t, nft.Options{})
	apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{classes()}}})
	for i, c := range []struct {
		name  string
		delta policy.Delta
		gone  bool
	}{
		{"neither", policy.Delta{}, false},
		{"settle", policy.Delta{Settle: true}, true},
		{"pause", policy.Delta{Pause: 1}, true},
	} {
		owed := others(profileWeb + uint32(2*i))
		fresh := func(n uint32) []policy.Op { return []policy.Op{put(access(profileWeb+100+uint32(i), n), classWeb)} }
		r := apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(owed, classDeny)}}}})
		finish(t, table, r)
		apply(t, table, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{{put(others(profileWeb+uint32(2*i+1)), classDeny)}}, Drops: []policy.Op{del(owed)}}})
		c.delta.Steps = [][]policy.Op{fresh(1), fresh(2)}
		r = apply(t, table, nft.Change{Delta: c.delta})
		if _, found, err := table.Lookup(context.Background(), owed); err != nil || found == c.gone {
			t.Errorf("%s: what was owed before is there: %v, %v; want %v", c.name, found, err, !c.gone)
		}
		finish(t, table, r)
	}
}

// once cancels what a flip adds and drops again.
func once(ops []policy.Op) []policy.Op {
	added := map[policy.Key]int{}
	var out []policy.Op
	for _, o := range ops {
		if i, ok := added[o.Key]; ok && o.Delete {
			out[i].Key = policy.Key{}
			continue
		}
		if !o.Delete && o.Map == policy.Access {
			added[o.Key] = len(out)
		}
		out = append(out, o)
	}
	kept := out[:0]
	for _, o := range out {
		if o.Key != (policy.Key{}) {
			kept = append(kept, o)
		}
	}
	return kept
}

func runNft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %v: %v\n%s", args, err, out)
	}
	return string(out)
}
