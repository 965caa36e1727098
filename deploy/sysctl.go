package deploy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// SetForwarding switches IPv4 and IPv6 forwarding on below procSys (/proc/sys) and returns
// what it changed. A kernel without IPv6 is no error. An interface that accepts router
// advertisements goes on doing so: the kernel would stop with forwarding unless accept_ra is 2
// (Documentation/networking/ip-sysctl.rst).
func SetForwarding(procSys string) (changed []string, err error) {
	v6 := filepath.Join(procSys, "net/ipv6/conf/all/forwarding")
	if read(v6) == "0" {
		changed, err = keepAdvertisements(procSys)
		if err != nil {
			return changed, err
		}
	}
	for _, path := range []string{filepath.Join(procSys, "net/ipv4/ip_forward"), v6} {
		set, err := setSysctl(path, "0", "1")
		if err != nil {
			return changed, err
		}
		if set {
			changed = append(changed, path+" = 1")
		}
	}
	return changed, nil
}

func keepAdvertisements(procSys string) (changed []string, err error) {
	paths, err := filepath.Glob(filepath.Join(procSys, "net/ipv6/conf/*/accept_ra"))
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, path := range paths {
		if name := filepath.Base(filepath.Dir(path)); name == "all" || name == "lo" || name == "default" {
			continue
		}
		set, err := setSysctl(path, "1", "2")
		if err != nil {
			return changed, err
		}
		if set {
			changed = append(changed, path+" = 2")
		}
	}
	return changed, nil
}

// setSysctl writes to where path holds from.
func setSysctl(path, from, to string) (bool, error) {
	if read(path) != from {
		return false, nil
	}
	err := os.WriteFile(path, []byte(to), 0o644)
	if errors.Is(err, os.ErrNotExist) { // the interface went away
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("set sysctl (it needs root, and in a container a privileged one): %w", err)
	}
	return true, nil
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
