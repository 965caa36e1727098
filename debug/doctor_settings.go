package debug

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/deploy"
)

// procSys is where the kernel's settings are.
const procSys = "/proc/sys"

// sysctl reads a file below /proc/sys; "" when there is none.
func sysctl(path string) string {
	b, err := os.ReadFile(filepath.Join(procSys, path))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func setSysctl(path, value string) error {
	if err := os.WriteFile(filepath.Join(procSys, path), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s: %w", path, err)
	}
	return nil
}

// setForwarding is nftcni install's, which keeps an uplink's router advertisements alive.
func setForwarding() error {
	_, err := deploy.SetForwarding(procSys)
	return err
}

func checkForwarding() []Finding {
	var out []Finding
	for _, f := range []struct{ family, path, key string }{
		{"IPv4", "net/ipv4/ip_forward", "net.ipv4.ip_forward"},
		{"IPv6", "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"},
	} {
		name := "forwarding " + f.family
		switch v := sysctl(f.path); v {
		case "1", "2":
			out = append(out, ok(name, "on"))
		case "":
			out = append(out, warn(name, "the kernel has no "+f.family, "nothing to do unless pods shall have "+f.family))
		default:
			x := broken(name, "off: pods reach neither each other nor anything outside", "sysctl -w "+f.key+"=1, and keep it in /etc/sysctl.d as nftcni install does")
			x.fix = setForwarding
			out = append(out, x)
		}
	}
	if off := notForwarding(); len(off) > 0 && out[0].Health == Healthy {
		out[0] = broken(out[0].Check, "off for packets that come in on "+firstOf(off, 5), "sysctl -w net.ipv4.conf.INTERFACE.forwarding=1")
		out[0].fix = func() error {
			for _, name := range off {
				if err := setSysctl("net/ipv4/conf/"+name+"/forwarding", "1"); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return out
}

// notForwarding are the interfaces with IPv4 forwarding off. IPv6 asks conf/all only
// (Documentation/networking/ip-sysctl.rst).
func notForwarding() []string {
	paths, err := filepath.Glob(filepath.Join(procSys, "net/ipv4/conf/*/forwarding"))
	if err != nil {
		return nil
	}
	var off []string
	for _, path := range paths {
		name := filepath.Base(filepath.Dir(path))
		if !slices.Contains([]string{"all", "default", "lo"}, name) && sysctl("net/ipv4/conf/"+name+"/forwarding") == "0" {
			off = append(off, name)
		}
	}
	return off
}

// checkReversePath: strict filtering of all interfaces drops packets whose way back is
// another interface: asymmetric routes, several uplinks (kernel, ip-sysctl.rst).
func checkReversePath() Finding {
	const name = "reverse path filter"
	dropped := ""
	if n := netstat("TcpExt", "IPReversePathFilter"); n > 0 {
		dropped = fmt.Sprintf("; such filters have dropped %d packets so far (spoofed ones of pods among them)", n)
	}
	all, _ := strconv.Atoi(sysctl("net/ipv4/conf/all/rp_filter"))
	if all == 1 {
		f := warn(name, "net.ipv4.conf.all.rp_filter is 1 (strict): packets over asymmetric routes are dropped without a trace"+dropped,
			"sysctl -w net.ipv4.conf.all.rp_filter=2 unless the node must be strict; nftcni drops spoofed pod addresses itself")
		f.fix = func() error { return setSysctl("net/ipv4/conf/all/rp_filter", "2") }
		return f
	}
	return ok(name, "not strict for all interfaces (%d)%s", all, dropped)
}

// netstat reads a counter of /proc/net/netstat, 0 when there is none.
func netstat(group, counter string) uint64 {
	b, _ := os.ReadFile("/proc/net/netstat")
	var names []string
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != group+":" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		if i := slices.Index(names, counter); i > 0 && i < len(fields) {
			n, _ := strconv.ParseUint(fields[i], 10, 64)
			return n
		}
	}
	return 0
}

func checkConntrack() Finding {
	count, err1 := strconv.Atoi(sysctl("net/netfilter/nf_conntrack_count"))
	limit, err2 := strconv.Atoi(sysctl("net/netfilter/nf_conntrack_max"))
	if err1 != nil || err2 != nil {
		return warn("conntrack", "its counters cannot be read", "run as root on the node itself")
	}
	stat, _ := os.ReadFile("/proc/net/stat/nf_conntrack") // no counters: nothing to tell
	return conntrackFinding(count, limit, conntrackDrops(string(stat)))
}

// conntrackDrops sums the column drop of /proc/net/stat/nf_conntrack, a line of
// hexadecimal numbers for each CPU: packets refused because the table was full.
func conntrackDrops(stat string) uint64 {
	lines := strings.Split(strings.TrimSpace(stat), "\n")
	column := slices.Index(strings.Fields(lines[0]), "drop")
	var sum uint64
	for _, line := range lines[1:] {
		if f := strings.Fields(line); column >= 0 && column < len(f) {
			n, _ := strconv.ParseUint(f[column], 16, 64)
			sum += n
		}
	}
	return sum
}

func conntrackFinding(count, limit int, drops uint64) Finding {
	const name = "conntrack"
	text := fmt.Sprintf("%d of %d entries", count, limit)
	if drops > 0 {
		text += fmt.Sprintf("; %d packets were dropped because it was full", drops)
	}
	larger := fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", limit*2)
	switch {
	case limit > 0 && count*100 >= limit*90:
		return broken(name, text+": new connections are dropped when it is full", larger+", and find who opens so many (nftcni debug flows)")
	case limit > 0 && count*100 >= limit*70, drops > 0:
		return warn(name, text, larger)
	}
	return ok(name, "%s", text)
}

func checkClock() Finding {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return warn("clock", "its state cannot be read: "+err.Error(), "timedatectl status")
	}
	return clockFinding(time.Now(), state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0)
}

// clockFinding: certificates and leases of the API fail first when the clock is wrong.
func clockFinding(now time.Time, unsynchronised bool) Finding {
	const name = "clock"
	switch {
	case now.Year() < 2024:
		return broken(name, "it is "+now.UTC().Format(time.RFC3339)+": certificates will not be valid", "set the clock, start chrony or systemd-timesyncd")
	case unsynchronised:
		return warn(name, "not synchronised", "start chrony or systemd-timesyncd; in a virtual machine the host's clock may be enough")
	}
	return ok(name, "synchronised")
}
