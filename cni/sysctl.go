package cni

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
)

var sysctlKey = regexp.MustCompile(`^net([./][A-Za-z0-9_-]+)+$`)

// sysctlPath returns the file of a key of the network namespace: with dots or slashes
// between its parts as sysctl(8) has them, and IFNAME for the pod's interface.
func sysctlPath(key, ifname string) (string, error) {
	sep := "."
	if strings.Contains(key, "/") {
		sep = "/"
	}
	if !sysctlKey.MatchString(key) {
		return "", fmt.Errorf("%q is not a key of the network namespace, such as net.ipv4.conf.IFNAME.arp_filter", key)
	}
	parts := strings.Split(key, sep)
	for i, p := range parts {
		if p == "IFNAME" {
			parts[i] = ifname
		}
	}
	return filepath.Join(append([]string{"/proc/sys"}, parts...)...), nil
}

// A setting is one sysctl file and its value.
type setting struct{ path, value string }

// hostSettings are for the node's end of the veth. There is no proxy_arp: the pod has a
// permanent neighbour entry for its gateway. Redirects are off because two pods of the
// node are on the same "link" as the kernel sees it, and every packet must be routed.
// route_localnet lets 127.0.0.1 call the pod by a host port; the table drops what the pod
// itself sends to the node's loopback.
func hostSettings(ifname string, has4, has6, localnet bool) []setting {
	var list []setting
	if has4 && localnet {
		list = append(list, setting{"/proc/sys/net/ipv4/conf/" + ifname + "/route_localnet", "1"})
	}
	if has4 {
		dir := "/proc/sys/net/ipv4/conf/" + ifname + "/"
		list = append(list, setting{dir + "forwarding", "1"}, setting{dir + "rp_filter", "1"},
			setting{dir + "proxy_arp", "0"}, setting{dir + "send_redirects", "0"}, setting{dir + "accept_redirects", "0"})
	}
	if has6 {
		dir := "/proc/sys/net/ipv6/conf/" + ifname + "/"
		list = append(list, setting{dir + "disable_ipv6", "0"}, setting{dir + "accept_ra", "0"},
			setting{dir + "accept_dad", "0"}, setting{dir + "dad_transmits", "0"},
			setting{dir + "accept_redirects", "0"}, setting{dir + "proxy_ndp", "0"}, setting{dir + "forwarding", "1"})
	}
	return list
}

// podSettings are for the pod's end: nothing that comes over the wire configures it.
func podSettings(ifname string, has6 bool) []setting {
	if !has6 {
		return nil
	}
	dir := "/proc/sys/net/ipv6/conf/" + ifname + "/"
	return []setting{{dir + "disable_ipv6", "0"}, {dir + "accept_ra", "0"}, {dir + "accept_dad", "0"}, {dir + "dad_transmits", "0"}}
}

// apply writes the settings that differ: most have the value already, and a read is
// cheaper than a write that takes the RTNL lock.
func apply(list []setting) error {
	for _, s := range list {
		if now, err := os.ReadFile(s.path); err == nil && strings.TrimSpace(string(now)) == s.value {
			continue
		}
		if err := os.WriteFile(s.path, []byte(s.value), 0o644); err != nil {
			return fmt.Errorf("set sysctl: %w", err)
		}
	}
	return nil
}

// differing returns the settings that have another value.
func differing(list []setting) ([]string, error) {
	var bad []string
	for _, s := range list {
		now, err := os.ReadFile(s.path)
		if err != nil {
			return nil, fmt.Errorf("read sysctl: %w", err)
		}
		if got := strings.TrimSpace(string(now)); got != s.value {
			bad = append(bad, fmt.Sprintf("sysctl %s is %s, want %s", strings.TrimPrefix(s.path, "/proc/sys/"), got, s.value))
		}
	}
	return bad, nil
}

// inNetNS runs fn on a thread in ns: /proc/sys/net shows the namespace of the thread that
// opens it, and there is no netlink message for most of these settings. The thread ends
// with fn; it never goes back to the scheduler.
func inNetNS(ns netns.NsHandle, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
