package cni

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

func TestHeldByHostLocal(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"cbr0/10.244.1.7", "cbr0/last_reserved_ip.0", "six/fd00:10:244::7"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("container\r\neth0"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	held := heldByHostLocal(dir)
	for addr, want := range map[string]bool{
		"10.244.1.7": true, "10.244.1.8": false, "fd00:10:244::7": true, "fd00:10:244::8": false,
	} {
		if got := held(netip.MustParseAddr(addr)); got != want {
			t.Errorf("held(%s) = %v, want %v", addr, got, want)
		}
	}
	if heldByHostLocal(filepath.Join(dir, "absent"))(netip.MustParseAddr("10.244.1.7")) {
		t.Error("an address is held although host-local was never here")
	}
}
