package nft

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/nftcni/nftcni/policy"
)

func TestNextEpoch(t *testing.T) {
	for _, c := range []struct {
		name       string
		from, want uint32
	}{
		{"plain", 0x80000001, 0x80000002},
		{"skips the bit 0x4000", 0x80003fff, 0x80010000},
		{"never leaves the upper half", 0xffff3fff, policy.EpochFirst},
		{"from nothing", 0, policy.EpochFirst},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := nextEpoch(c.from); got != c.want {
				t.Errorf("nextEpoch(%#x) = %#x, want %#x", c.from, got, c.want)
			}
		})
	}
	for range 1000 {
		e, err := firstEpoch()
		if err != nil || e < policy.EpochFirst || e&epochClear != 0 {
			t.Fatalf("first epoch %#x, %v", e, err)
		}
	}
}

func TestCleanComment(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"plain", "shop/web-1", "shop/web-1"},
		{"would end nft's string", `a"b\c`, "a?b?c"},
		{"control characters", "a\nb\x00c\x7f", "a?b?c?"},
		{"not UTF-8", "a\xffb", "a?b"},
		{"too long", strings.Repeat("ä", 100), strings.Repeat("ä", 63)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := cleanComment(c.in); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestPrefixes(t *testing.T) {
	for _, c := range []struct {
		name, from, to string
		want           []string
	}{
		{"one address", "10.0.0.1", "10.0.0.1", []string{"10.0.0.1/32"}},
		{"a prefix", "10.0.0.0", "10.0.255.255", []string{"10.0.0.0/16"}},
		{"everything", "0.0.0.0", "255.255.255.255", []string{"0.0.0.0/0"}},
		{"ragged", "10.0.0.1", "10.0.0.4", []string{"10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/32"}},
		{"v6", "fd00::", "fd00::ffff", []string{"fd00::/112"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, p := range prefixes(netip.MustParseAddr(c.from), netip.MustParseAddr(c.to)) {
				got = append(got, p.String())
			}
			if strings.Join(got, " ") != strings.Join(c.want, " ") {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
}

func drawAddr(t *rapid.T, label string) netip.Addr {
	n := rapid.SampledFrom([]int{4, 16}).Draw(t, label+" size")
	a, _ := netip.AddrFromSlice(rapid.SliceOfN(rapid.Byte(), n, n).Draw(t, label))
	return a.Unmap()
}

func drawKey(t *rapid.T) policy.Key {
	k := policy.Key{Map: rapid.SampledFrom(elementMaps()).Draw(t, "map")}
	x, port := rapid.Uint32(), rapid.Uint16()
	switch k.Map {
	case policy.NetID:
		k.Addr, k.To = drawAddr(t, "from"), netip.Addr{}
		k.To = k.Addr
		if rapid.Bool().Draw(t, "to the end") {
			k.To = lastAddr(k.Addr)
		}
	case policy.PodID, policy.IngressProfile, policy.EgressProfile, policy.IsolatedIngress, policy.IsolatedEgress:
		k.Addr = drawAddr(t, "addr")
	case policy.Access:
		k.X, k.Y = x.Draw(t, "x"), x.Draw(t, "y")
	case policy.AccessPort, policy.AccessRange:
		k.X, k.Protocol, k.First = x.Draw(t, "x"), policy.Protocol(rapid.Byte().Draw(t, "protocol")), port.Draw(t, "first")
		if k.Map == policy.AccessRange {
			k.First = min(k.First, 0xfffe)
			k.Last = rapid.Uint16Range(k.First+1, 0xffff).Draw(t, "last")
		}
	default:
		k.X = x.Draw(t, "x")
	}
	return k
}

// TestKeysRoundTrip: what is encoded decodes to itself.
func TestKeysRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		k := drawKey(t)
		raw := encodeKey(k)
		elements := []rawElement{{key: raw.first, keyEnd: raw.end, data: host32(7)}}
		if raw.span && raw.after != nil {
			elements = append(elements, rawElement{key: raw.after, flags: unix.NFT_SET_ELEM_INTERVAL_END})
		}
		m := k.Map
		if m == policy.AccessPort && isICMP(k) {
			m = policy.AccessRange // ICMP has one map for both
		}
		got := policy.Tables{}
		if err := addElements(got, m, elements); err != nil {
			t.Fatal(err)
		}
		if _, ok := got[k]; !ok || len(got) != 1 {
			t.Fatalf("%+v came back as %v", k, got)
		}
	})
}

// FuzzAnswers: bytes from the socket never panic, whatever they are.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte{})
	f.Add(bytes.Repeat([]byte{36, 0, 0, 0, 2, 0}, 12))
	f.Fuzz(func(t *testing.T, data []byte) {
		b := newBatch(1)
		b.deleteTable()
		_, _ = b.answers(data, 1)
		_ = split(data)
		if s := cleanComment(string(data)); !utf8.ValidString(s) || len(s) > commentMax {
			t.Errorf("comment %q", s)
		}
	})
}
