package main

import (
	"encoding/json"
	"net/netip"
	"testing"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// TestKernelDebugNoise: while one pod is denied 10,000 times a second, the one denial of
// another pod, of the same policy, is listed and counted, and the noise is counted whole.
func TestKernelDebugNoise(t *testing.T) { inFreshNode(t, testDebugNoise) }

func testDebugNoise(t *testing.T) {
	n := newRedisNode(t, false)
	pair := n.php.families(n.redis)[0]
	var sent int
	var took time.Duration
	noise := make(chan error, 1)
	began := time.Now()
	go func() {
		noise <- inNetNS(n.php.netns, func() (err error) {
			sent, err = openConnections(netip.AddrPortFrom(pair[1], 6379), 10000, 4*time.Second)
			took = time.Since(began)
			return err
		})
	}()
	// The one denial comes when the noise has long used up what is logged of it.
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n.denied(t)["shop/php"] < 1000 {
		select {
		case <-tick.C:
		case err := <-noise: // a machine under load sends less, but not that little in four seconds
			t.Fatalf("%d datagrams in %v are no noise: %v", sent, took, err)
		}
	}
	quiet := n.nodejs.families(n.redis)[0]
	p := &probe{src: n.nodejs, dst: n.redis, from: quiet[0], to: quiet[1], service: service{policy.TCP, 8080}}
	if err := askAll(t.Context(), []*probe{p}, func(*probe) bool { return false }); err != nil || p.answered {
		t.Fatalf("%s: answered %v, %v", p, p.answered, err)
	}
	if err := <-noise; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d denied datagrams in %v", sent, took)
	n.until(t, "TCP/8080", "flows", "--denied", "--pod", "nodejs").want(t, 0, "shop/nodejs", "shop/redis")
	drops := n.debug(t, "drops", "--last", "200")
	drops.want(t, 0, "TCP/8080", "shop/nodejs", "shop/php")
	if got := n.denied(t); got["shop/nodejs"] != 1 || got["shop/php"] < uint64(sent)*99/100 || got["shop/php"] > uint64(sent) {
		t.Errorf("counted %v, want 1 of nodejs and the %d of php", got, sent)
	}
	if err := n.close(); err != nil {
		t.Error(err)
	}
}

// denied is the packets that debug drops counts, by source.
func (n *redisNode) denied(t *testing.T) map[string]uint64 {
	t.Helper()
	var d struct {
		Counters []struct {
			Src     string `json:"src"`
			Packets uint64 `json:"packets"`
		} `json:"counters"`
	}
	a := n.debugQuietly(t, "drops", "-o", "json")
	if err := json.Unmarshal([]byte(a.stdout), &d); err != nil {
		t.Fatalf("%v in %s", err, a.stdout)
	}
	out := map[string]uint64{}
	for _, c := range d.Counters {
		out[c.Src] += c.Packets
	}
	return out
}
