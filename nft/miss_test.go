package nft_test

import (
	"os"
	"strings"
	"testing"
)

// TestKernelMisses measures, for docs/decisions/0002, what asking twice and waiting are good for: with NFTCNI_MISSES
// set to "once" (the second lookups are taken out) or "nowait" (Apply does not wait between two changes of one key), or "both".
// It decides nothing: misses are rare, and newer kernels have none.
func TestKernelMisses(t *testing.T) {
	mode := os.Getenv("NFTCNI_MISSES")
	if mode == "" {
		t.Skip("a measurement: set NFTCNI_MISSES to once, nowait or both")
	}
	needNft(t)
	w, f := flipWorld(t, false)
	if mode == "once" || mode == "both" {
		dropSecond(t, "ingress4", "ingress_profile4")
		dropSecond(t, "ingress_peer4", "pod_id4")
		runNft(t, "flush", "set", "inet", "nftcni", "isolated_ingress4") // as before isolation was a set of its own
	}
	w.table.AssumeExact()
	lost, leaked := underTraffic(t, w, f, seconds(t), flips(t, w.table, f.change))
	t.Logf("%s: %d lost, %d leaked", mode, lost, leaked)
}

// dropSecond deletes the second rule of a chain that asks a map.
func dropSecond(t *testing.T, chain, set string) {
	t.Helper()
	seen := 0
	for _, line := range strings.Split(runNft(t, "-a", "list", "chain", "inet", "nftcni", chain), "\n") {
		if !strings.Contains(line, "@"+set) {
			continue
		}
		if seen++; seen == 2 {
			_, handle, _ := strings.Cut(line, "# handle ")
			runNft(t, "delete", "rule", "inet", "nftcni", chain, "handle", strings.TrimSpace(handle))
		}
	}
}
