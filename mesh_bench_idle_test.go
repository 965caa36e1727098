package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/nftcni/nftcni/nft"
)

// probesEnd is when paths that answered nothing are asked for the last time after the agent's start, with some room: the
// nodes of the manifests do not exist.
const probesEnd = 6 * time.Minute

// idle prints what both agents do while nothing happens, for IDLE seconds (120), and what a thousand
// nodes cost: the agents have just been started on a node that had everything.
func (w *meshBench) idle() {
	for _, n := range w.nodes {
		rss, peak := n.memory()
		fmt.Printf("agent of %s: %d routes to other nodes, CPU since its start %.2f s, RSS %d MiB (peak %d)\n", n.name, n.meshRoutes(), n.cpu().Seconds(), rss, peak)
	}
	seconds, err := strconv.Atoi(os.Getenv("IDLE"))
	if err != nil || seconds < 1 {
		seconds = 120
	}
	settle := time.NewTimer(probesEnd)
	<-settle.C
	ctx, cancel := context.WithCancel(w.b.Context())
	defer cancel()
	var before [2]time.Duration
	var generation [2]uint32
	var heard [2]*int
	for i, n := range w.nodes {
		heard[i] = n.listen(ctx)
		before[i], generation[i] = n.cpu(), n.generation()
	}
	wait := time.NewTimer(time.Duration(seconds) * time.Second)
	<-wait.C
	for i, n := range w.nodes {
		used := n.cpu() - before[i]
		fmt.Printf("agent of %s, idle for %d s: CPU %.1f ms = %.4f%% of a core, commits to nf_tables %d, changes of links, addresses, routes and neighbours %d\n",
			n.name, seconds, used.Seconds()*1000, used.Seconds()/float64(seconds)*100, n.generation()-generation[i], *heard[i])
	}
}

// cpu is the CPU time of all threads of the agent so far.
func (n *meshBenchNode) cpu() (total time.Duration) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", n.agent.Process.Pid))
	n.check(err)
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // the thread ended
		}
		ns, err := strconv.ParseInt(strings.Fields(string(b))[0], 10, 64)
		n.check(err)
		total += time.Duration(ns)
	}
	return total
}

// memory is the agent's resident set in MiB, now and at most.
func (n *meshBenchNode) memory() (now, peak int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.agent.Process.Pid))
	n.check(err)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.Atoi(f[1])
		switch f[0] {
		case "VmRSS:":
			now = kib / 1024
		case "VmHWM:":
			peak = kib / 1024
		}
	}
	return now, peak
}

func (n *meshBenchNode) generation() (g uint32) {
	n.do(func() (err error) {
		g, err = nft.CurrentGeneration(n.b.Context(), nft.Options{})
		return err
	})
	return g
}

// listen counts what the kernel tells about links, addresses, routes and permanent neighbours until
// ctx ends.
func (n *meshBenchNode) listen(ctx context.Context) *int {
	count := new(int)
	routes, links, addrs := make(chan netlink.RouteUpdate, 64), make(chan netlink.LinkUpdate, 64), make(chan netlink.AddrUpdate, 64)
	neighs := make(chan netlink.NeighUpdate, 64)
	n.do(func() error {
		for _, subscribe := range []func() error{
			func() error { return netlink.RouteSubscribe(routes, ctx.Done()) },
			func() error { return netlink.LinkSubscribe(links, ctx.Done()) },
			func() error { return netlink.AddrSubscribe(addrs, ctx.Done()) },
			func() error { return netlink.NeighSubscribe(neighs, ctx.Done()) },
		} {
			if err := subscribe(); err != nil {
				return err
			}
		}
		return nil
	})
	go func() {
		for {
			select {
			case <-routes:
				*count++
			case <-links:
				*count++
			case <-addrs:
				*count++
			case u := <-neighs:
				if u.State&netlink.NUD_PERMANENT != 0 {
					*count++
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return count
}
