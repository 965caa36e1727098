package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
)

// floorTable is what we compare with: conntrack alone.
const floorTable = "floor"

const (
	meshRounds  = 9
	meshBursts  = 60  // of each side in a round, in turn: what else the machine does falls on both alike
	meshBurst   = 600 // packets
	meshChunk   = 300 * time.Millisecond
	meshNew     = 16_000 // connections of a chunk, each of one packet
	handDevice  = "hand0"
	handVNI     = 99
	handPort    = 4789
	floorMetric = 1
)

// A meshMeasure is one number of a chunk: CPU nanoseconds, or a rate.
type meshMeasure struct {
	what   string
	rounds int
	take   func() float64
}

// packets prints one row for each kind of traffic: medians with conntrack alone and with nftcni, in turn,
// and the median and the range of the rounds' ratios.
func (w *meshBench) packets() {
	for _, n := range w.nodes {
		n.stop() // its table stays in force, and nobody mends what the measurement switches off
		n.nft("table inet " + floorTable + " { flags dormant; chain forward { type filter hook forward priority filter; ct state established,related accept; }\n }")
	}
	stop := w.serve()
	defer stop()
	for family, name := range []string{"IPv4", "IPv6"} {
		for _, n := range w.nodes {
			n.handMade(family)
		}
		w.mustBeJudged(family)
		w.established(name, family)
		if os.Getenv("PARTS") != "" && w.mode == cni.MeshAuto {
			w.parts(name, family)
		}
		for _, m := range []meshMeasure{
			{"new connections, CPU ns/packet", meshRounds, func() float64 { return w.sendNew(family) }},
			{"TCP_RR, transactions/s", 5, func() float64 { return w.roundTrips(family) }},
			{"iperf3, Gbit/s", 5, func() float64 { return w.iperf(family) }},
		} {
			w.compare(name, family, m)
		}
		for _, n := range w.nodes {
			n.do(func() error { return delLink(handDevice) })
		}
	}
	for _, n := range w.nodes {
		n.check(n.tables.conn.Close())
		n.tables = nil
		n.start()
	}
}

func (w *meshBench) compare(family string, index int, m meshMeasure) {
	var floor, ours []float64
	for i := range m.rounds {
		var pair [2]float64
		for _, side := range []int{i % 2, 1 - i%2} {
			w.use(side == 1, index)
			pair[side] = m.take()
		}
		floor, ours = append(floor, pair[0]), append(ours, pair[1])
	}
	w.use(true, index)
	w.row(family, m.what, floor, ours)
}

// row prints the medians of both sides' rounds, and the median and the range of the rounds' ratios.
func (w *meshBench) row(family, what string, floor, ours []float64) {
	load, _ := os.ReadFile("/proc/loadavg")
	format := "| %s | %s | %s | %.0f | %.0f | **%.3f** | %.3f (%.3f to %.3f) | %s |\n"
	if strings.Contains(what, "Gbit") {
		format = strings.Replace(format, "%.0f | %.0f", "%.2f | %.2f", 1)
	}
	ratio := make([]float64, len(floor))
	for i := range floor {
		ratio[i] = ours[i] / floor[i]
	}
	slices.Sort(ratio)
	fmt.Printf(format, w.mode, family, what, medianOf(floor), medianOf(ours), medianOf(ours)/medianOf(floor), medianOf(ratio), ratio[0], ratio[len(ratio)-1], strings.Fields(string(load))[0])
}

func medianOf(list []float64) float64 {
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// use puts our table in force on both nodes, or conntrack alone; behind VXLAN our device, or the
// one made by hand.
func (w *meshBench) use(ours bool, family int) {
	table := floorTable
	if ours {
		table = nft.TableName
	}
	w.useTable(table, family)
}

// useTable puts one table in force and makes the one before it dormant.
func (w *meshBench) useTable(table string, family int) {
	ours := table != floorTable
	for _, n := range w.nodes {
		n.check(n.switchTo(table))
		if w.mode == cni.MeshVXLAN {
			n.do(func() error { return n.handRoute(family, !ours) })
		}
	}
}

// handMade makes a VXLAN device to the other node as one would with ip(8).
func (n *meshBenchNode) handMade(family int) {
	self, peer := n.underlay(family), n.other().underlay(family)
	n.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = handDevice, net.HardwareAddr{2, 0, 0, 0, 0, byte(n.number)}
		v := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: handVNI, Port: handPort, SrcAddr: self.AsSlice(), UDPCSum: true}
		if err := netlink.LinkAdd(v); err != nil {
			return err
		}
		mac := net.HardwareAddr{2, 0, 0, 0, 0, byte(n.other().number)}
		fdb := &netlink.Neigh{LinkIndex: v.Index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, HardwareAddr: mac, IP: peer.AsSlice()}
		neigh := &netlink.Neigh{LinkIndex: v.Index, State: netlink.NUD_PERMANENT, HardwareAddr: mac, IP: n.other().gateway(family).AsSlice()}
		return errors.Join(linkUp(handDevice), netlink.NeighSet(fdb), netlink.NeighSet(neigh))
	})
}

func (n *meshBenchNode) other() *meshBenchNode { return n.nodes[2-n.number] }

func (n *meshBenchNode) underlay(family int) netip.Addr {
	return netip.MustParseAddr([]string{fmt.Sprintf("192.168.0.%d", n.number), fmt.Sprintf("fd01::%x", n.number)}[family])
}

func (n *meshBenchNode) network(family int) netip.Prefix {
	return netip.MustParsePrefix([]string{fmt.Sprintf("10.100.%d.0/24", n.number), fmt.Sprintf("fd02:%x::/64", n.number)}[family])
}

// gateway is the address of the node inside the tunnel made by hand.
func (n *meshBenchNode) gateway(family int) netip.Addr {
	return netip.MustParseAddr([]string{fmt.Sprintf("169.254.99.%d", n.number), fmt.Sprintf("fe80::%x", n.number)}[family])
}

// handRoute prefers the device made by hand, or no longer.
func (n *meshBenchNode) handRoute(family int, on bool) error {
	l, err := netlink.LinkByName(handDevice)
	if err != nil {
		return err
	}
	to := n.other().network(family)
	r := &netlink.Route{Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: maskOf(to)}, LinkIndex: l.Attrs().Index, Priority: floorMetric,
		Gw: n.other().gateway(family).AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
	if on {
		return netlink.RouteReplace(r)
	}
	if err := netlink.RouteDel(r); !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

func delLink(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkDel(l)
}

// serve answers in the second pod: TCP 80 and 81 echo bytes, UDP 80 is read by answer only, so that a
// packet ends where its socket is found.
func (w *meshBench) serve() (stop func()) {
	ctx, cancel := context.WithCancel(w.b.Context())
	w.check(inNetNS(w.nodes[1].pod, func() error {
		for _, port := range []string{":80", ":81"} {
			l, err := net.Listen("tcp", port)
			if err != nil {
				return err
			}
			context.AfterFunc(ctx, func() { _ = l.Close() })
			go echoAll(l)
		}
		var err error
		if w.sink, err = net.ListenUDP("udp", &net.UDPAddr{Port: 80}); err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { _ = w.sink.Close() })
		cmd := exec.CommandContext(ctx, "iperf3", "--server")
		if err := errors.Join(w.sink.SetReadBuffer(1), cmd.Start()); err != nil {
			return err
		}
		go func() { _ = cmd.Wait() }()
		return nil
	}))
	return cancel
}

func echoAll(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
	}
}

// mustBeJudged: what is measured is a policy in force.
func (w *meshBench) mustBeJudged(family int) {
	w.use(true, family)
	c, err := w.dial(family, 80, 5*time.Second)
	if err != nil {
		w.b.Fatalf("the policies deny what they allow: %v", err)
	}
	w.check(c.Close())
	if c, err := w.dial(family, 81, 500*time.Millisecond); err == nil {
		_ = c.Close()
		w.b.Fatal("the policies are not in force")
	}
}

// sendNew is the thread's CPU time of the first packet of a connection.
func (w *meshBench) sendNew(family int) (cost float64) {
	w.flushConntrack()
	w.check(inNetNS(w.nodes[0].pod, func() error {
		var cpus unix.CPUSet
		cpus.Set(runtime.NumCPU() - 1)
		if err := unix.SchedSetaffinity(0, &cpus); err != nil {
			return err
		}
		fd, next, err := meshSocket(w.nodes[0].podAddrs[family], w.nodes[1].podAddrs[family], true)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cost, err = sendChunk(fd, next)
		return err
	}))
	return cost
}

// meshSocket connects a socket whose packets are next's answers: a datagram of one flow, or with a
// raw socket one of another source port each time.
func meshSocket(from, to netip.Addr, fresh bool) (fd int, next func(i int) []byte, err error) {
	kind, protocol := unix.SOCK_DGRAM, unix.IPPROTO_UDP
	if fresh {
		kind, protocol = unix.SOCK_RAW, unix.IPPROTO_UDP
	}
	domain, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: 80, Addr: [4]byte(to.AsSlice()[:4])})
	if to.Is6() {
		domain, address = unix.AF_INET6, &unix.SockaddrInet6{Port: 80, Addr: to.As16()}
		if fresh {
			address = &unix.SockaddrInet6{Port: unix.IPPROTO_UDP, Addr: to.As16()}
		}
	}
	if fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, protocol); err != nil {
		return -1, nil, err
	}
	if err = unix.Connect(fd, address); err != nil {
		return -1, nil, errors.Join(err, unix.Close(fd))
	}
	if !fresh {
		data := make([]byte, 32)
		return fd, func(int) []byte { return data }, nil
	}
	head := make([]byte, 8+32) // UDP: ports, length, checksum
	binary.BigEndian.PutUint16(head[2:], 80)
	binary.BigEndian.PutUint16(head[4:], uint16(len(head)))
	sum := pseudoSum(from, to, head)
	return fd, func(i int) []byte {
		port := uint16(1024 + i)
		binary.BigEndian.PutUint16(head, port)
		s := sum + uint32(port)
		s = s&0xffff + s>>16
		binary.BigEndian.PutUint16(head[6:], cmp.Or(^uint16(s), 0xffff))
		return head
	}, nil
}

// pseudoSum is the sum of UDP's pseudo header and of data whose source port and checksum are 0.
func pseudoSum(from, to netip.Addr, data []byte) uint32 {
	sum := uint32(unix.IPPROTO_UDP + len(data))
	for _, part := range [][]byte{from.AsSlice(), to.AsSlice(), data} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return sum
}

func sendChunk(fd int, next func(int) []byte) (float64, error) {
	for range 200 { // the first ones open the flow and warm the caches
		if _, err := unix.Write(fd, next(-1)); err != nil {
			return 0, err
		}
	}
	var before, after unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before); err != nil {
		return 0, err
	}
	for i := range meshNew {
		if _, err := unix.Write(fd, next(i)); err != nil {
			return 0, err
		}
	}
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)
	return float64(after.Nano()-before.Nano()) / meshNew, err
}

// roundTrips is how many bytes a second go there and back on one TCP connection.
func (w *meshBench) roundTrips(family int) float64 {
	c, err := w.dial(family, 80, 5*time.Second)
	w.check(err)
	defer c.Close()
	one, began, n := make([]byte, 1), time.Now(), 0
	for ; time.Since(began) < 2*meshChunk; n++ {
		if _, err := c.Write(one); err != nil {
			w.b.Fatal(err)
		}
		if _, err := io.ReadFull(c, one); err != nil {
			w.b.Fatal(err)
		}
	}
	return float64(n) / time.Since(began).Seconds()
}

func (w *meshBench) iperf(family int) float64 {
	var out []byte
	w.check(inNetNS(w.nodes[0].pod, func() (err error) {
		out, err = exec.Command("iperf3", "--client", w.nodes[1].podAddrs[family].String(), "--time", "2", "--json").Output()
		return err
	}))
	var result struct {
		End struct {
			Sum struct {
				Rate float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	w.check(json.Unmarshal(out, &result))
	return result.End.Sum.Rate / 1e9
}
