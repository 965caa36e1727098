package cni

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrivateKeyFile(t *testing.T) {
	dir := t.TempDir()
	first, err := loadPrivateKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := loadPrivateKeys(dir); err != nil || again != first {
		t.Errorf("read again: %v", err)
	}
	name := filepath.Join(dir, privateKeyFile)
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	for _, tt := range []struct {
		name  string
		spoil func() error
		want  string
	}{
		{"damaged", func() error { return os.WriteFile(name, []byte("x"), 0o600) }, "is damaged: remove it"},
		{"others may read it", func() error { return os.Chmod(name, 0o644) }, "chmod 600"},
		{"a link", func() error { return errors.Join(os.Remove(name), os.Symlink("/dev/zero", name)) }, "has mode"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.spoil(); err != nil {
				t.Fatal(err)
			}
			if _, err := loadPrivateKeys(dir); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestKeyring(t *testing.T) {
	a, b := testKey(1), testKey(2)
	for _, tt := range []struct{ name, text, want, fault string }{
		{"as wg prints it", a, "0:" + a, ""},
		{"one", "1:" + a, "1:" + a, ""},
		{"two, newest last", "1:" + a + " 0:" + b, "1:" + a + " 0:" + b, ""},
		{"white space", " 0:" + a + "\n", "0:" + a, ""},
		{"nothing", " ", "", "0 keys"},
		{"three", a + " " + a + " " + a, "", "3 keys"},
		{"one parity twice", "1:" + a + " 1:" + b, "", "two keys of parity 1"},
		{"not base64", "0:???", "", "not 32 bytes"},
		{"short", "0:AAAA", "", "not 32 bytes"},
		{"zero", wgKey{}.String(), "", "all zero"},
		{"another parity", "2:" + a, "", "not 32 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			k, err := parseKeyring(tt.text)
			if tt.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fault) {
					t.Fatalf("got %v, want %q", err, tt.fault)
				}
				return
			}
			if err != nil || k.String() != tt.want {
				t.Errorf("got %q, %v; want %q", k, err, tt.want)
			}
		})
	}
}

// Keys come from other nodes' annotations. What is taken reads back the same.
func FuzzKeyring(f *testing.F) {
	a, b := testKey(1), testKey(2)
	for _, text := range []string{a, "0:" + a, "1:" + a + " 0:" + b, "0:" + a + " 0:" + b, "1:", " : ", "0:\x00"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		k, err := parseKeyring(text)
		if err != nil {
			return
		}
		again, err := parseKeyring(k.String())
		if err != nil || again != k {
			t.Errorf("%q reads back as %v, %v", text, again, err)
		}
	})
}

func TestPlanWireGuard(t *testing.T) {
	a, b := testKey(1), testKey(2)
	self := Peer{Name: "n1", Addrs: addrs("192.0.2.1"), PodCIDRs: prefixes("10.244.1.0/24")}
	peer := func(name, addr, cidr, key string) Peer {
		return Peer{Name: name, Addrs: addrs(addr), PodCIDRs: prefixes(cidr), PublicKey: key}
	}
	for _, tt := range []struct {
		name    string
		peers   []Peer
		via     string
		problem string
	}{
		{"a key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", a)}, "wireguard", ""},
		{"no key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", "")}, "unreachable", "not known"},
		{"damaged key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", "AAAA")}, "unreachable", "cannot be used"},
		{"our own key", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", b)}, "unreachable", "this node's own"},
		{"one key twice", []Peer{peer("n2", "192.0.2.2", "10.244.2.0/24", a), peer("n3", "192.0.2.3", "10.244.3.0/24", a)}, "wireguard unreachable", "belongs to node n2 already"},
		{"no common family", []Peer{peer("n2", "2001:db8::2", "10.244.2.0/24", a)}, "unreachable", "no address family"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := MeshConfig{Encrypt: EncryptWireGuard}
			if err := cfg.complete(); err != nil {
				t.Fatal(err)
			}
			v := testView()
			v.keys.key[0] = wgKeyOf(t, b)
			state, r, err := cfg.planMesh(self, tt.peers, v)
			if err != nil {
				t.Fatal(err)
			}
			checkPlan(t, r, tt.via, tt.problem)
			for _, p := range r.Paths {
				if _, fenced := state.routes[routeKey{p.PodCIDR, fenceMetric}]; p.Via == ViaWireGuard && !fenced {
					t.Errorf("%s has no fence", p.PodCIDR)
				}
			}
		})
	}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
