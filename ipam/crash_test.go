package ipam

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const envChurn = "NFTCNI_IPAM_TEST_CHURN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(envChurn); dir != "" {
		churn(dir)
	}
	os.Exit(m.Run())
}

// churn leases and releases until it is killed, and says so after each step.
func churn(dir string) {
	s, err := New(Options{Dir: dir, Boot: "boot-1"})
	if err != nil {
		panic(err)
	}
	pools := []Pool{{mustRangeOf("10.0.0.0/24")}, {mustRangeOf("fd00::/64")}}
	for n := 0; ; n++ {
		o := owner(n % 40)
		if _, err := s.Release(context.Background(), o); err != nil {
			panic(err)
		}
		if _, err := s.Acquire(context.Background(), Request{Owner: o, Pools: pools, Payload: []byte(`"` + strings.Repeat("x", n%3000) + `"`)}); err != nil {
			panic(err)
		}
		fmt.Println(n)
	}
}

// TestKilledProcess kills a process that writes, at any instant, and looks at the file as
// another process of the same boot and as the first one of the next.
func TestKilledProcess(t *testing.T) {
	dir := t.TempDir()
	for round := range 20 {
		c := exec.Command(os.Args[0])
		c.Env = append(os.Environ(), envChurn+"="+dir)
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		// Some output, then somewhere in the steps after it.
		if _, err := out.Read(make([]byte, 1+rand.IntN(64))); err != nil {
			t.Fatal(err)
		}
		for range rand.IntN(2000) {
			_ = os.Getpid()
		}
		_ = c.Process.Kill()
		_ = c.Wait()
		for _, boot := range []string{"boot-1", fmt.Sprint("after-", round)} {
			s := openStore(t, Options{Dir: dir, Boot: boot, Report: func(m string) { t.Errorf("round %d: %s", round, m) }})
			if err := s.update(t.Context(), func(tb *tables) error { return tb.check() }); err != nil {
				t.Fatalf("round %d as %s: %v", round, boot, err)
			}
		}
	}
}

// TestPowerCut makes a file in which every page is either of before or of after some
// transactions, as a disk may hold it when nothing was synced. Whatever comes of it, the
// first opening of the next boot has no address twice and what lives keeps its own.
func TestPowerCut(t *testing.T) {
	const page = 4096
	pools := []Pool{{mustRangeOf("10.0.0.0/24")}}
	aside := 0
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		dir := t.TempDir()
		path := filepath.Join(dir, FileName)
		s := openStore(t, Options{Dir: dir})
		for n := range 30 {
			acquire(t, s, Request{Owner: owner(n), NetNS: "gone", Payload: []byte(`"` + strings.Repeat("x", 200) + `"`), Pools: pools})
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for n := range 30 {
			if _, err := s.Release(t.Context(), owner(n)); err != nil {
				t.Fatal(err)
			}
			acquire(t, s, Request{Owner: owner(100 + n), NetNS: "gone", Pools: pools})
		}
		after, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		cut := bytes.Clone(after)
		for at := 0; at+page <= min(len(before), len(after)); at += page {
			if rnd.IntN(2) == 0 {
				copy(cut[at:at+page], before[at:at+page])
			}
		}
		if err := os.WriteFile(path, cut, 0o600); err != nil {
			t.Fatal(err)
		}
		live := netip.MustParseAddr("10.0.0.200")
		next := openStore(t, Options{Dir: dir, Boot: "boot-2", Report: func(string) { aside++ },
			Live: func(context.Context) ([]Lease, error) { return []Lease{{Address: live, Owner: owner(999)}}, nil }})
		seen := map[netip.Addr]bool{}
		for n := 1000; n < 1030; n++ {
			a := acquire(t, next, Request{Owner: owner(n), Pools: pools})[0]
			if seen[a] || a == live && aside > 0 {
				t.Fatalf("seed %d: %s given twice", seed, a)
			}
			seen[a] = true
		}
		if err := next.update(t.Context(), func(tb *tables) error { return tb.check() }); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	t.Logf("%d of 50 files set aside", aside)
}

// FuzzLeaseFile opens bytes that somebody else wrote as the first process of a boot.
func FuzzLeaseFile(f *testing.F) {
	dir := f.TempDir()
	s := openStore(f, Options{Dir: dir})
	if _, err := s.Acquire(context.Background(), Request{Owner: owner(1), Pools: []Pool{{mustRangeOf("10.0.0.0/24")}}}); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(filepath.Join(dir, FileName))
	if err != nil {
		f.Fatal(err)
	}
	whole = bytes.TrimRight(whole, "\x00")
	f.Add([]byte{}, 0, []byte{})
	f.Add([]byte("hello"), 0, []byte{})
	f.Add(whole, 0, []byte{})
	f.Add(whole, 2*4096, []byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, content []byte, at int, patch []byte) {
		dir := t.TempDir()
		content = bytes.Clone(content)
		if at >= 0 && at < len(content) {
			copy(content[at:], patch)
		}
		if err := os.WriteFile(filepath.Join(dir, FileName), content, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openStore(t, Options{Dir: dir})
		for n := 10; n < 13; n++ {
			if _, err := s.Acquire(t.Context(), Request{Owner: owner(n), Pools: []Pool{{mustRangeOf("10.0.0.0/24")}}}); err != nil {
				t.Fatal(err)
			}
		}
	})
}
