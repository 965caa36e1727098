package cni

import (
	"net/netip"
	"os"
	"path/filepath"
)

// hostLocalDir is where the reference IPAM plugin host-local keeps its reservations, unless its
// configuration says otherwise: a directory per network, a file per address.
const hostLocalDir = "/var/lib/cni/networks"

// heldByHostLocal tells addresses that host-local gave to a pod of another plugin. On a node
// that migrates, such pods may stand behind a bridge, where they have no route of their own.
func heldByHostLocal(dir string) func(netip.Addr) bool {
	networks, err := os.ReadDir(dir)
	if err != nil {
		return func(netip.Addr) bool { return false }
	}
	return func(a netip.Addr) bool {
		for _, n := range networks {
			if _, err := os.Lstat(filepath.Join(dir, n.Name(), a.String())); err == nil {
				return true
			}
		}
		return false
	}
}
