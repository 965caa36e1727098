package nft_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
)

// TestKernelUnwired: pods of another CNI obey policy, have no source guard, read back as
// they were bound, and go without a trace.
func TestKernelUnwired(t *testing.T) {
	needNft(t)
	w := newWorld(t)
	empty := podSets(t)
	foreign := w.Outside("foreign", "10.8.0.1", "fd08::1")
	w.Await(foreign)
	want(t, "foreign pod before", foreign.TCP(at("10.9.0.1", 80)), false)
	var bind []nft.Binding
	for _, a := range foreign.Addrs {
		bind = append(bind, nft.Binding{Addr: a, Comment: "other/foreign"})
	}
	r := apply(t, w.table, nft.Change{Bind: bind})
	finish(t, w.table, r)
	var got []nft.Binding
	for _, b := range state(t, w.table).Bindings {
		if b.Interface == "" {
			got = append(got, b)
		}
	}
	if diff := cmp.Diff(bind, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("bindings read back (-bound +read):\n%s", diff)
	}
	if again := apply(t, w.table, nft.Change{Bind: bind}); again.Transactions != 0 {
		t.Errorf("binding again took %d transactions", again.Transactions)
	}
	for _, a := range []string{"10.9.0.1", "fd09::1"} {
		want(t, "foreign pod to server "+a, foreign.TCP(at(a, 80)), false)
	}
	for _, a := range foreign.Addrs {
		foreign.EchoTCP(a, 80)
		for _, from := range []*nfttest.Host{w.client, w.outside, &w.Host, foreign} {
			want(t, from.Name+" to foreign pod "+a.String(), from.TCP(netip.AddrPortFrom(a, 80)), true)
		}
	}
	if n := count(t, "a local pod's address from outside"); n != 0 {
		t.Errorf("%d packets of the foreign pod counted as forged", n)
	}
	reopened := open(t, nft.Options{})
	if s := state(t, reopened); len(s.Bindings) != len(state(t, w.table).Bindings) {
		t.Errorf("adopted bindings: %v", s.Bindings)
	}
	r = apply(t, w.table, nft.Change{Unbind: bind})
	finish(t, w.table, r)
	if diff := cmp.Diff(empty, podSets(t)); diff != "" {
		t.Errorf("elements left (-before +after):\n%s", diff)
	}
}

// podSets lists the sets that bindings fill.
func podSets(t *testing.T) string {
	t.Helper()
	text := ""
	for _, set := range []string{"local", "wired", "self", "bound", "masquerade"} {
		for _, family := range []string{"4", "6"} {
			text += runNft(t, "list", "set", "inet", nft.TableName, set+family)
		}
	}
	return text
}
