package deploy

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Pods of the bridge plugin look for the whole range of their node behind the bridge. While both kinds of
// pods run, the node has to answer for those that are routed.

// record of the links whose proxy_arp ProxyARP changed, one a line.
func (l Layout) proxied() string { return filepath.Join(l.ConfigDir, "proxy_arp") }

// ProxyARP switches proxy_arp on for a link of another plugin, below procSys (/proc/sys), and
// remembers it for RestoreProxyARP. It reports whether it changed anything.
func (l Layout) ProxyARP(procSys, link string) (bool, error) {
	changed, err := setSysctl(filepath.Join(procSys, "net/ipv4/conf", link, "proxy_arp"), "0", "1")
	if err != nil || !changed {
		return false, err
	}
	known := read(l.in(l.proxied()))
	if _, err := writeFile(l.in(l.proxied()), []byte(strings.TrimSpace(known+"\n"+link)+"\n"), 0o644); err != nil {
		return true, fmt.Errorf("remember %s for uninstall: %w", link, err)
	}
	return true, nil
}

// RestoreProxyARP undoes ProxyARP; links that are gone are no error.
func (l Layout) RestoreProxyARP(procSys string) error {
	for link := range strings.FieldsSeq(read(l.in(l.proxied()))) {
		if _, err := setSysctl(filepath.Join(procSys, "net/ipv4/conf", link, "proxy_arp"), "1", "0"); err != nil {
			return err
		}
	}
	return nil
}
