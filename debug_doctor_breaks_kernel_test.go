package main

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestKernelDoctorBreaks breaks one thing of the node after the other: the doctor names it
// with a remedy, --fix mends what is safe, and afterwards it finds nothing again.
func TestKernelDoctorBreaks(t *testing.T) { inFreshNode(t, testDoctorBreaks) }

func testDoctorBreaks(t *testing.T) {
	n := newRedisNode(t, false)
	conf := n.path("net.d")
	writeFile(t, conf+"/10-nftcni.conflist", `{"plugins": [{"type": "nftcni"}]}`)
	uplink(t)
	redis := n.attachedLink(t, n.redis)
	for _, test := range []struct {
		name       string
		breaks     func(t *testing.T)
		status     int
		says       []string
		fixed      bool
		packetless bool // redis cannot be reached meanwhile
		undo       func(t *testing.T)
	}{
		{name: "IPv4 forwarding", breaks: setting("ipv4/ip_forward", "0"), status: 1, says: []string{"sysctl -w net.ipv4.ip_forward=1"}, fixed: true, packetless: true},
		{name: "IPv6 forwarding", breaks: func(t *testing.T) {
			setting("ipv6/conf/all/forwarding", "0")(t)
			setting("ipv6/conf/up0/accept_ra", "1")(t)
		}, status: 1, says: []string{"sysctl -w net.ipv6.conf.all.forwarding=1"}, fixed: true, undo: func(t *testing.T) {
			if got := strings.TrimSpace(readFile(t, "/proc/sys/net/ipv6/conf/up0/accept_ra")); got != "2" {
				t.Errorf("accept_ra of the uplink is %s: it would lose its router", got)
			}
		}},
		{name: "forwarding of an interface", breaks: setting("ipv4/conf/up0/forwarding", "0"), status: 1,
			says: []string{"off for packets that come in on up0"}, fixed: true},
		{name: "strict reverse path filter", breaks: setting("ipv4/conf/all/rp_filter", "1"), status: 0,
			says: []string{"rp_filter is 1 (strict)", "sysctl -w net.ipv4.conf.all.rp_filter=2"}, fixed: true},
		{name: "Docker's policy, iptables-nft", breaks: nftScript("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"), status: 1,
			says: []string{"ip filter chain FORWARD has policy drop for forwarded packets", "nothing in it accepts any", "iptables -I FORWARD -i nft+ -j ACCEPT"}, packetless: true,
			undo: nftScript("delete table ip filter")},
		{name: "policy drop with other accepts", breaks: nftScript("table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; iifname docker0 accept; }; }"), status: 0,
			says: []string{"that no rule before accepts", "DOCKER-USER"}, packetless: true, undo: nftScript("delete table ip filter")},
		{name: "the remedy, in DOCKER-USER", breaks: nftScript(`table ip filter { chain DOCKER-USER { iifname "nft*" counter accept; oifname "nft*" counter accept; }
			chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; }; }`), status: 0,
			says: []string{"none drops what pods send or get (tables: ip filter)"}, undo: nftScript("delete table ip filter")},
		{name: "firewalld", breaks: nftScript(`table inet firewalld { chain filter_FORWARD_ZONES { iifname up0 accept; }
			chain filter_FORWARD { type filter hook forward priority 10; ct state established,related accept; jump filter_FORWARD_ZONES; reject with icmpx admin-prohibited; }; }`), status: 0,
			says: []string{"inet firewalld chain filter_FORWARD rule 2 (handle", "rejects all forwarded packets", "firewall-cmd"}, packetless: true, undo: nftScript("delete table inet firewalld")},
		{name: "a rule that has dropped", breaks: func(t *testing.T) {
			nftScript(`table inet guard { chain FORWARD { type filter hook forward priority 10; tcp dport 6379 counter drop comment "change 4711"; }; }`)(t)
			n.ask(t, n.nodejs, n.redis, false)
		}, status: 0, says: []string{"inet guard chain FORWARD rule 0 (handle", `"change 4711"`, "drops some packets (", "debug trace"}, packetless: true, undo: nftScript("delete table inet guard")},
		{name: "iptables-legacy", breaks: func(t *testing.T) { legacyForwardPolicy(t, true) }, status: 0,
			says: []string{"iptables-legacy filter FORWARD has policy DROP", "iptables-legacy -I FORWARD -i nft+"}, packetless: true,
			undo: func(t *testing.T) { legacyForwardPolicy(t, false) }},
		{name: "MTU above the uplink's", breaks: linkMTU("up0", 1300), status: 0, says: []string{"the uplink up0 1300", "set mtu: 1300"}, undo: linkMTU("up0", 1500)},
		{name: "pod interface down", breaks: linkState(redis, false), status: 1, says: []string{"down: " + redis, "restart the pod"}, packetless: true,
			undo: func(t *testing.T) {
				linkState(redis, true)(t)
				n.until(t, "no route to "+n.redis.addrs[0].String()+" (shop/redis)", "doctor").want(t, 1, "ip route replace")
				for _, addr := range n.redis.addrs {
					podRoute(redis, addr)(t)
				}
			}},
		{name: "configuration that is no JSON", breaks: func(t *testing.T) { writeFile(t, conf+"/01-bad.conf", "{") }, status: 1,
			says: []string{"01-bad.conf: not JSON", "mend or remove it"}, undo: removeFile(conf + "/01-bad.conf")},
		{name: "another plugin first", breaks: func(t *testing.T) { writeFile(t, conf+"/05-other.conflist", `{"plugins": [{"type": "bridge"}]}`) }, status: 0,
			says: []string{"05-other.conflist comes before 10-nftcni.conflist", "rename ours"}, undo: removeFile(conf + "/05-other.conflist")},
		{name: "two kube-proxies", breaks: nftScript("table ip kube-proxy { chain services { }; }; table ip nat { chain KUBE-SERVICES { }; }"), status: 0,
			says: []string{"rules of several modes: nftables and iptables"}, undo: nftScript("delete table ip kube-proxy; delete table ip nat")},
	} {
		t.Run(test.name, func(t *testing.T) {
			doctor := func(args ...string) answer {
				return n.debug(t, append([]string{"doctor", "--cni-conf-dir", conf}, args...)...)
			}
			before := doctor()
			before.want(t, 0)
			test.breaks(t)
			doctor().want(t, test.status, append(test.says, "remedy: ")...)
			if test.packetless {
				n.ask(t, n.nodejs, n.redis, false)
			}
			if test.fixed {
				doctor("--fix").want(t, 0, "fixed")
			}
			if test.undo != nil {
				test.undo(t)
			}
			n.ask(t, n.nodejs, n.redis, true)
			if after := doctor(); findings(after) != findings(before) {
				t.Errorf("afterwards:\n%s\nbefore:\n%s", after.stdout, before.stdout)
			}
		})
	}
}

// findings is the checks and how they ended, without what they found.
func findings(a answer) string {
	var out []string
	for line := range strings.Lines(a.stdout) {
		for _, health := range []string{"ok", "warning", "broken", "fixed"} {
			if check, _, found := strings.Cut(line, "  "+health+"  "); found && !strings.HasPrefix(line, " ") {
				out = append(out, strings.TrimSpace(check)+": "+health)
			}
		}
	}
	return strings.Join(out, "\n")
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func removeFile(name string) func(*testing.T) {
	return func(t *testing.T) {
		t.Helper()
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
}

func setting(key, value string) func(*testing.T) {
	return func(t *testing.T) {
		t.Helper()
		if err := os.WriteFile("/proc/sys/net/"+key, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func nftScript(text string) func(*testing.T) {
	return func(t *testing.T) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "nft", text).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("nft is not installed: this test makes a foreign table")
		}
		if err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	}
}

func linkMTU(name string, mtu int) func(*testing.T) {
	return onLink(name, func(l netlink.Link) error { return netlink.LinkSetMTU(l, mtu) })
}

func linkState(name string, up bool) func(*testing.T) {
	return onLink(name, func(l netlink.Link) error {
		if up {
			return netlink.LinkSetUp(l)
		}
		return netlink.LinkSetDown(l)
	})
}

func onLink(name string, f func(netlink.Link) error) func(*testing.T) {
	return func(t *testing.T) {
		t.Helper()
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = f(l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func podRoute(name string, to netip.Addr) func(*testing.T) {
	return onLink(name, func(l netlink.Link) error {
		return netlink.RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}})
	})
}

// uplink gives the node a default route over a link whose other end nobody holds.
func uplink(t *testing.T) {
	t.Helper()
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0", MTU: 1500}, PeerName: "up1"}); err != nil {
		t.Fatal(err)
	}
	onLink("up0", func(l netlink.Link) error {
		return errors.Join(netlink.LinkSetUp(l), netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK, Priority: 500,
			Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}}))
	})(t)
}

// attachedLink is the host side of a pod.
func (n *redisNode) attachedLink(t *testing.T, e *endpoint) string {
	t.Helper()
	routes, err := netlink.RouteGet(e.addrs[0].AsSlice())
	if err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().Name
}

// legacyForwardPolicy sets the policy of FORWARD as iptables-legacy -P does: the whole
// table read, one verdict changed, and put back (linux/netfilter_ipv4/ip_tables.h).
func legacyForwardPolicy(t *testing.T, drop bool) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	option := func(call uintptr, option int, b []byte) error {
		size := uintptr(len(b))
		length := uintptr(unsafe.Pointer(&size))
		if call == unix.SYS_SETSOCKOPT {
			length = size
		}
		_, _, errno := unix.Syscall6(call, uintptr(fd), unix.SOL_IP, uintptr(option), uintptr(unsafe.Pointer(&b[0])), length, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	info := make([]byte, 84)
	copy(info, "filter")
	if err := option(unix.SYS_GETSOCKOPT, 64, info); err != nil {
		t.Skipf("iptables-legacy: this kernel has no such table: %v", err)
	}
	entries, size := binary.NativeEndian.Uint32(info[76:]), binary.NativeEndian.Uint32(info[80:])
	got := make([]byte, 40+size)
	copy(got, "filter")
	binary.NativeEndian.PutUint32(got[32:], size)
	if err := option(unix.SYS_GETSOCKOPT, 65, got); err != nil {
		t.Fatal(err)
	}
	verdict := ^uint32(1) // -NF_ACCEPT - 1
	if drop {
		verdict = ^uint32(0) // -NF_DROP - 1
	}
	policy := binary.NativeEndian.Uint32(info[56+4*unix.NF_INET_FORWARD:])
	binary.NativeEndian.PutUint32(got[40+policy+112+32:], verdict)
	counters := make([]byte, 16*entries)
	put := make([]byte, 96, 96+size) // struct ipt_replace
	copy(put, "filter")
	copy(put[32:36], info[32:])                      // valid_hooks
	binary.NativeEndian.PutUint32(put[36:], entries) // num_entries
	binary.NativeEndian.PutUint32(put[40:], size)    // size
	copy(put[44:84], info[36:76])                    // hook_entry, underflow
	binary.NativeEndian.PutUint32(put[84:], entries) // num_counters
	binary.NativeEndian.PutUint64(put[88:], uint64(uintptr(unsafe.Pointer(&counters[0]))))
	if err := option(unix.SYS_SETSOCKOPT, 64, append(put, got[40:]...)); err != nil {
		t.Fatal(err)
	}
}
