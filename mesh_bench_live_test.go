package main

import (
	"errors"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// established prints the thread's CPU time of one packet of a live connection: the sender's system call runs the whole
// way through both nodes to the receiver's socket. Both sides send short bursts of one connection in turn.
func (w *meshBench) established(name string, family int) {
	cost, stop := w.flow(family)
	defer stop()
	var floor, ours []float64
	for i := range meshRounds {
		var sum [2]float64
		for j := range meshBursts {
			for _, side := range []int{(i + j) % 2, 1 - (i+j)%2} {
				w.use(side == 1, family)
				sum[side] += cost()
			}
		}
		floor, ours = append(floor, sum[0]/meshBursts), append(ours, sum[1]/meshBursts)
	}
	w.use(true, family)
	w.row(name, "established, CPU ns/packet", floor, ours)
}

// flow opens a connection between the pods that the table allows; cost sends a burst of it. The calling goroutine keeps
// its thread, and the thread its CPU, until stop.
func (w *meshBench) flow(family int) (cost func() float64, stop func()) {
	w.use(true, family)
	w.flushConntrack()
	var fd int
	data := make([]byte, 32)
	w.check(inNetNS(w.nodes[0].pod, func() (err error) {
		if fd, _, err = meshSocket(w.nodes[0].podAddrs[family], w.nodes[1].podAddrs[family], false); err != nil {
			return err
		}
		return w.answer(fd, data)
	}))
	runtime.LockOSThread()
	var before, one unix.CPUSet
	one.Set(runtime.NumCPU() - 1)
	w.check(errors.Join(unix.SchedGetaffinity(0, &before), unix.SchedSetaffinity(0, &one)))
	cost = func() float64 {
		c, err := sendBurst(fd, data)
		w.check(err)
		return c
	}
	return cost, func() {
		w.check(errors.Join(unix.SchedSetaffinity(0, &before), unix.Close(fd)))
		runtime.UnlockOSThread()
	}
}

func (w *meshBench) flushConntrack() {
	for _, n := range w.nodes {
		n.do(func() error { return errors.Join(netlink.ConntrackTableFlush(netlink.ConntrackTable)) })
	}
}

func sendBurst(fd int, data []byte) (float64, error) {
	var before, after unix.Timespec
	for i := range meshBurst / 10 * 11 {
		if i == meshBurst/10 { // the first ones warm the caches
			if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before); err != nil {
				return 0, err
			}
		}
		if _, err := unix.Write(fd, data); err != nil {
			return 0, err
		}
	}
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)
	return float64(after.Nano()-before.Nano()) / meshBurst, err
}

// answer makes a flow established: a datagram there, and one back.
func (w *meshBench) answer(fd int, data []byte) error {
	buf := make([]byte, 64)
	for err := error(nil); err == nil; _, err = w.sink.Read(buf) { // what earlier chunks have left
		if err := w.sink.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			return err
		}
	}
	if err := w.sink.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if _, err := unix.Write(fd, data); err != nil {
		return err
	}
	_, from, err := w.sink.ReadFromUDP(buf)
	if err != nil {
		return err
	}
	if _, err := w.sink.WriteTo(data, from); err != nil {
		return err
	}
	_, err = unix.Read(fd, buf)
	return err
}
