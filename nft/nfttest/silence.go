package nfttest

import (
	"context"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a probe waits at least before silence counts as an answer. NFTCNI_PATIENCE, a duration,
// changes it for slow machines.
func patience() time.Duration {
	if d, err := time.ParseDuration(os.Getenv("NFTCNI_PATIENCE")); err == nil && d > 0 {
		return d
	}
	return 300 * time.Millisecond
}

// silence calls end when an answer that has not come will not come: after patience, and after as many round trips
// between two goroutines through the kernel as take a machine under load longer than any one answer. After stop it does not.
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

// roundTrips sends one byte to and fro until it was there fifty times, or ctx ends.
func roundTrips(ctx context.Context) {
	const rounds = 50
	here, there, err := socketPair()
	if err != nil {
		return
	}
	defer here.Close()
	defer there.Close()
	defer context.AfterFunc(ctx, func() { _ = here.Close() })()
	go func() {
		b := make([]byte, 1)
		for {
			if _, err := there.Read(b); err != nil {
				return
			}
			if _, err := there.Write(b); err != nil {
				return
			}
		}
	}()
	for b := []byte{0}; ; {
		if _, err := here.Write(b); err != nil {
			return
		}
		if _, err := here.Read(b); err != nil {
			return
		}
		if b[0]++; b[0] == rounds {
			return
		}
	}
}

func socketPair() (here, there net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, fileErr := net.FileConn(f)
		_ = f.Close()
		if fileErr != nil {
			err = fileErr
			continue
		}
		conns[i] = c
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	}
	return conns[0], conns[1], err
}
