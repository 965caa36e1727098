package nft_test

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nftcni/nftcni/nft"
)

// elementsOf are the commands that fill the sets of another program as a listing has them.
func elementsOf(listing, program string) string {
	var b strings.Builder
	for _, m := range regexp.MustCompile(`(?s)\t(?:set|map) (\w+) \{\n(.*?)\n\t\}\n`).FindAllStringSubmatch(listing, -1) {
		_, elements, found := strings.Cut(m[2], "elements = ")
		declared := regexp.MustCompile(`\t(?:set|map) ` + m[1] + ` \{[^\n]*\}\n`) // and not constant
		if found && declared.MatchString(program) {
			b.WriteString("add element inet nftcni " + m[1] + " " + strings.ReplaceAll(elements, "\n", " ") + "\n")
		}
	}
	return b.String()
}

// witness counts the allowed packets where they come to the node and where they leave it: what is lost in between was
// lost by rules, what is lost elsewhere by a busy machine's queues.
const witness = `table inet witness {
	chain came { type filter hook prerouting priority -500;
		ip saddr 10.9.0.1 udp dport 9 counter
		ip6 daddr fd09::2 udp dport 9 counter
	}
	chain went { type filter hook postrouting priority 500;
		ip saddr 10.9.0.1 udp dport 9 counter
		ip6 daddr fd09::2 udp dport 9 counter
	}
}`

// witnessed are its counters: live and fresh where they came, live and fresh where they went.
func witnessed(t *testing.T) (n [4]int64) {
	t.Helper()
	i := 0
	for _, line := range strings.Split(runNft(t, "list", "table", "inet", "witness"), "\n") {
		if _, after, ok := strings.Cut(line, "counter packets "); ok && i < len(n) {
			_, _ = fmt.Sscan(after, &n[i])
			i++
		}
	}
	return n
}

// TestKernelUpgrade replaces programs of versions before, one that had neither host ports nor podToHost and one that asked for
// the binding on postrouting, while an allowed connection sends, new ones begin and forbidden ones try: nothing is lost and
// nothing gets through.
func TestKernelUpgrade(t *testing.T) {
	for _, name := range []string{"host-ports", "delivery"} {
		t.Run(name, func(t *testing.T) { upgradeFrom(t, programBefore(t, name)) })
	}
}

func programBefore(t *testing.T, name string) string {
	t.Helper()
	needNft(t)
	old, err := os.ReadFile("testdata/program-before-" + name + ".nft")
	if err != nil {
		t.Fatal(err)
	}
	return string(old)
}

// TestKernelUpgradeOwesBump: the second bump of a revocation is made though its maker died and the program is another one.
func TestKernelUpgradeOwesBump(t *testing.T) {
	old := programBefore(t, "delivery")
	w := newWorld(t)
	before := state(t, w.table)
	elements := regexp.MustCompile(`(inet nftcni epoch \{ \S+)`).ReplaceAllString(elementsOf(nftList(t), old), `$1 comment "bump again"`)
	_ = w.table.Close()
	nftFile(t, "delete table inet nftcni\n"+old+elements)
	after := state(t, open(t, nft.Options{}))
	if after.Epoch == before.Epoch {
		t.Error("connections that were stamped between the two bumps are live still")
	}
	if set := runNft(t, "list", "set", "inet", nft.TableName, "epoch"); strings.Contains(set, "again") {
		t.Errorf("a bump is owed still:\n%s", set)
	}
}

func upgradeFrom(t *testing.T, old string) {
	w := newWorld(t)
	before := state(t, w.table)
	elements := elementsOf(nftList(t), old)
	_ = w.table.Close()

	nftFile(t, witness)
	const rate = 3000
	live, fresh, denied := w.client.Sink(addr("10.9.0.2"), 9), w.client.Sink(addr("fd09::2"), 9), w.server.Sink(addr("10.9.0.1"), 90)
	stop := make(chan struct{})
	var tasks sync.WaitGroup
	var sentLive, sentFresh, sentDenied int64
	steady := w.server.DialUDP(at("10.9.0.2", 9))
	tasks.Go(func() {
		pace := time.NewTicker(time.Second / rate)
		defer pace.Stop()
		for {
			select {
			case <-stop:
				return
			case <-pace.C:
				if _, err := steady.Write([]byte("x")); err == nil {
					sentLive++
				}
			}
		}
	})
	tasks.Go(func() { sentFresh, _ = w.outside.Flood(at("fd09::2", 9), rate, stop) })
	tasks.Go(func() { sentDenied, _ = w.stranger.Flood(at("10.9.0.1", 90), rate, stop) })

	for range 20 {
		nftFile(t, "delete table inet nftcni\n"+old+elements)
		was := generation(t)
		table := open(t, nft.Options{})
		after := state(t, table)
		if after.Generation == was {
			t.Fatal("the program of the version before was taken for this one's")
		}
		if len(after.Tables) != len(before.Tables) || len(after.Bindings) != len(before.Bindings) || len(after.PodNetworks) != len(before.PodNetworks) || after.Epoch != before.Epoch {
			t.Fatalf("carried over %d elements, %d bindings, %d networks, epoch %#x; want %d, %d, %d, %#x", len(after.Tables), len(after.Bindings),
				len(after.PodNetworks), after.Epoch, len(before.Tables), len(before.Bindings), len(before.PodNetworks), before.Epoch)
		}
		_ = table.Close()
	}
	close(stop)
	tasks.Wait()
	arrived := [2]int64{live.Total(), fresh.Total()}
	seen := witnessed(t)
	t.Logf("of %d and %d allowed packets %d and %d came to the node, %d and %d left it, %d and %d arrived", sentLive, sentFresh, seen[0], seen[1],
		seen[2], seen[3], arrived[0], arrived[1])
	if seen[0] != seen[2] || seen[1] != seen[3] || seen[0] == 0 || seen[1] == 0 {
		t.Errorf("the rules lost %d packets of a live connection and %d new connections", seen[0]-seen[2], seen[1]-seen[3])
	}
	if n := denied.Total(); n != 0 || sentDenied == 0 {
		t.Errorf("%d of %d forbidden packets arrived", n, sentDenied)
	}
}
