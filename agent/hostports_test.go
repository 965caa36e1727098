package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// ported is an attachment with host ports, each "protocol host pod".
func ported(pod, iface, addr string, ports ...string) cni.Attachment {
	a := attachmentOf("shop", pod, "", iface, addr)
	for _, p := range ports {
		f := strings.Fields(p)
		a.HostPorts = append(a.HostPorts, cni.HostPort{Protocol: f[0], Host: netip.MustParseAddrPort(f[1]), Pod: netip.MustParseAddrPort(f[2])})
	}
	return a
}

func (m *memoryTable) mapped() []string {
	var out []string
	for _, p := range m.ports {
		out = append(out, p.String())
	}
	slices.Sort(out)
	return out
}

func TestHostPortConflicts(t *testing.T) {
	first := "tcp 0.0.0.0:80 10.0.0.1:8080"
	for _, tt := range []struct {
		name, first, second string
		taken               bool
	}{
		{"the same", first, "tcp 0.0.0.0:80 10.0.0.2:1", true},
		{"one address of every", first, "tcp 192.0.2.1:80 10.0.0.2:1", true},
		{"every address and one", "tcp 192.0.2.1:80 10.0.0.1:8080", "tcp 0.0.0.0:80 10.0.0.2:1", true},
		{"another address", "tcp 192.0.2.1:80 10.0.0.1:8080", "tcp 192.0.2.2:80 10.0.0.2:1", false},
		{"another port", first, "tcp 0.0.0.0:81 10.0.0.2:1", false},
		{"another protocol", first, "udp 0.0.0.0:80 10.0.0.2:1", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := newMemoryTable()
				l, ctx := startLoop(t, table, nil)
				_ = l.send(ctx, l.replace(shopCluster, nil))
				if _, err := l.attach(ctx, ported("web", "nft000000000001", "10.0.0.1", tt.first)); err != nil {
					t.Fatal(err)
				}
				before := table.mapped()
				second := ported("db", "nft000000000002", "10.0.0.2", tt.second)
				_, err := l.attach(ctx, second)
				if (err != nil) != tt.taken {
					t.Fatalf("attach: %v, want refused %v", err, tt.taken)
				}
				if !tt.taken {
					return
				}
				if err.Code != codeTryAgain || !strings.Contains(err.Message, "shop/db") || !strings.Contains(err.Message, "taken by pod shop/web") {
					t.Errorf("attach: code %d, %s", err.Code, err.Message)
				}
				if !slices.Equal(table.mapped(), before) || len(table.bindings) != 1 {
					t.Errorf("a refused attachment left %v, %v", table.mapped(), table.bindings)
				}
				// The holder finishes: the port is free.
				done := policy.Pod{Name: web, Node: "n1", Finished: true}
				_ = l.send(ctx, l.apply([]policy.Event{{Pod: &done}}, nil))
				if _, err := l.attach(ctx, second); err != nil {
					t.Errorf("attach when the holder has finished: %v", err)
				}
				if got := table.mapped(); len(got) != 1 || !strings.HasSuffix(got[0], "10.0.0.2:1") {
					t.Errorf("mapped %v", got)
				}
			})
		})
	}
}

// TestHostPortsFollowAttachments: they come and go with them, and a restart writes nothing.
func TestHostPortsFollowAttachments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		l, ctx := startLoop(t, table, nil)
		_ = l.send(ctx, l.replace(shopCluster, nil))
		a := ported("web", "nft000000000001", "10.0.0.1", "tcp 0.0.0.0:80 10.0.0.1:8080", "sctp 192.0.2.1:80 10.0.0.1:80")
		b := ported("db", "nft000000000002", "10.0.0.2", "udp 0.0.0.0:80 10.0.0.2:80")
		for _, x := range []cni.Attachment{a, b, a} {
			if _, err := l.attach(ctx, x); err != nil {
				t.Fatal(err)
			}
		}
		want := []string{"sctp 192.0.2.1:80 -> 10.0.0.1:80", "tcp 0.0.0.0:80 -> 10.0.0.1:8080", "udp 0.0.0.0:80 -> 10.0.0.2:80"}
		if got := table.mapped(); !slices.Equal(got, want) {
			t.Errorf("mapped %v, want %v", got, want)
		}
		if err := l.bound(ctx, a); err != nil {
			t.Errorf("CHECK: %v", err)
		}
		other := a
		other.HostPorts = a.HostPorts[:1]
		if err := l.bound(ctx, other); err == nil {
			t.Error("CHECK does not see that a host port is missing")
		}
		synctest.Wait()
		writes := table.writes
		next, ctx := startLoop(t, table, func(l *loop) { l.inv.attach(a); l.inv.attach(b) })
		_ = next.send(ctx, next.replace(shopCluster, nil))
		synctest.Wait()
		if table.writes != writes {
			t.Errorf("a restart with nothing changed wrote %d changes", table.writes-writes)
		}
		if err := next.detach(ctx, cni.DetachRequest{ContainerID: a.ContainerID, Interface: "eth0", HostInterface: a.HostInterface}); err != nil {
			t.Fatal(err)
		}
		if got := table.mapped(); !slices.Equal(got, want[2:]) {
			t.Errorf("after a DEL %v, want %v", got, want[2:])
		}
		synctest.Wait()
		third, ctx := startLoop(t, table, nil) // the other one's DEL came while no agent ran
		_ = third.send(ctx, third.replace(shopCluster, nil))
		synctest.Wait()
		if got := table.mapped(); len(got) != 0 {
			t.Errorf("after a restart without attachments %v", got)
		}
	})
}

func TestCheckHostPorts(t *testing.T) {
	for _, tt := range []struct {
		name, port string
		ok         bool
	}{
		{"plain", "tcp 0.0.0.0:80 10.0.0.1:80", true}, {"protocol", "icmp 0.0.0.0:80 10.0.0.1:80", false}, {"port 0", "tcp 0.0.0.0:0 10.0.0.1:80", false},
		{"pod's port 0", "tcp 0.0.0.0:80 10.0.0.1:0", false}, {"somebody else's address", "tcp 0.0.0.0:80 10.0.0.2:80", false},
		{"two families", "tcp [::]:80 10.0.0.1:80", false}, {"mapped", "tcp [::ffff:192.0.2.1]:80 10.0.0.1:80", false},
	} {
		if err := checkAttachment(ported("web", "nft000000000001", "10.0.0.1", tt.port)); (err == nil) != tt.ok {
			t.Errorf("%s: %v, want ok %v", tt.name, err, tt.ok)
		}
	}
	p := "tcp 0.0.0.0:80 10.0.0.1:80"
	if err := checkAttachment(ported("web", "nft000000000001", "10.0.0.1", p, p)); err == nil {
		t.Error("one port twice was taken")
	}
	if err := checkAttachment(ported("web", "nft000000000001", "10.0.0.1", slices.Repeat([]string{p}, maxHostPorts+1)...)); err == nil {
		t.Error("any number of ports was taken")
	}
}
