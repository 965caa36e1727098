package nfttest

import (
	"context"
	"net"
	"os"
	"sync"
	"time"
)

// patience is how long a probe waits at least before silence counts as an answer. NFTCNI_PATIENCE, a duration,
// changes it for slow machines.
func patience() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("NFTCNI_PATIENCE")); err == nil && d > 0 {
		return d
	}
	return 300 * time.Millisecond
}

// silence calls end when an answer that has not come will not come: after patience and roundTrips. After stop it does not.
func silence(end func()) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex // held while end runs
	timer := time.AfterFunc(patience(), func() {
		roundTrips(ctx)
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil {
			end()
		}
	})
	return func() {
		timer.Stop()
		mu.Lock()
		defer mu.Unlock()
		cancel()
	}
}

// roundTrips sends twenty datagrams over the loopback, 10 ms apart, and reads each: that many turns a machine under load
// gives its other processes, and the kernel's handling of packets, before it ends.
func roundTrips(ctx context.Context) {
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err == nil {
		defer c.Close()
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for b := []byte{0}; b[0] < 20; b[0]++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if err != nil {
			continue // a namespace whose loopback is down: the turns alone
		}
		if _, sendErr := c.WriteTo(b, c.LocalAddr()); sendErr == nil {
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			_, _ = c.Read(make([]byte, 1))
		}
	}
}
