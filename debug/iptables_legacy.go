package debug

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacyForward is chain FORWARD of the filter table of iptables-legacy or
// ip6tables-legacy, which nf_tables does not show.
type legacyForward struct {
	program string // iptables-legacy or ip6tables-legacy
	family  uint8  // NFPROTO_*
	drops   bool   // its policy is DROP
	spares  bool   // it accepts what comes from and goes to nft+ before it drops
	blocks  []string
}

// legacyFamily is how one family's tables are read: linux/netfilter_ipv4/ip_tables.h and
// linux/netfilter_ipv6/ip6_tables.h.
type legacyFamily struct {
	program, names     string
	domain, level      int
	ipSize             int // of struct ipt_ip or ip6t_ip6
	iniface, iniMask   int // offsets in it
	outiface, outiMask int
}

// The get options of both families (IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES).
const (
	legacyGetInfo    = 64
	legacyGetEntries = 65
	legacyNameSize   = 32
	legacyInfoSize   = legacyNameSize + 4 + 5*4 + 5*4 + 4 + 4
	legacyMaxEntries = 16 << 20 // bytes
)

func legacyFamilies() []legacyFamily {
	return []legacyFamily{
		{program: "iptables-legacy", names: "/proc/net/ip_tables_names", domain: unix.AF_INET, level: unix.SOL_IP, ipSize: 84,
			iniface: 16, outiface: 32, iniMask: 48, outiMask: 64},
		{program: "ip6tables-legacy", names: "/proc/net/ip6_tables_names", domain: unix.AF_INET6, level: unix.SOL_IPV6, ipSize: 136,
			iniface: 64, outiface: 80, iniMask: 96, outiMask: 112},
	}
}

// legacyForwards reads the chains that exist. A table that nobody has used is not asked
// for, because asking would make it.
func legacyForwards() ([]legacyForward, error) {
	var out []legacyForward
	for _, f := range legacyFamilies() {
		names, err := os.ReadFile(f.names)
		if err != nil || !slices.Contains(strings.Fields(string(names)), "filter") {
			continue // no kernel support, or no such table
		}
		info, entries, err := f.read()
		if err != nil {
			return out, fmt.Errorf("read the filter table of %s: %w", f.program, err)
		}
		chain, err := f.forward(info, entries)
		if err != nil {
			return out, fmt.Errorf("filter table of %s: %w", f.program, err)
		}
		out = append(out, chain)
	}
	return out, nil
}

// read returns struct ipt_getinfo and the entries of table filter.
func (f legacyFamily) read() (info, entries []byte, err error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	info = make([]byte, legacyInfoSize)
	copy(info, "filter")
	if err := getsockopt(fd, f.level, legacyGetInfo, info); err != nil {
		return nil, nil, err
	}
	size := binary.NativeEndian.Uint32(info[legacyInfoSize-4:])
	if size > legacyMaxEntries {
		return nil, nil, fmt.Errorf("it has %d bytes", size)
	}
	const header = 40 // name, size, and the padding of a structure with 8 byte counters
	b := make([]byte, header+size)
	copy(b, "filter")
	binary.NativeEndian.PutUint32(b[legacyNameSize:], size)
	if err := getsockopt(fd, f.level, legacyGetEntries, b); err != nil {
		return nil, nil, err
	}
	return info, b[header:], nil
}

func getsockopt(fd, level, option int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	runtime.KeepAlive(b)
	if errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}

// forward reads the rules of FORWARD itself; those of chains it jumps to are left out.
func (f legacyFamily) forward(info, entries []byte) (legacyForward, error) {
	at := func(field int) int { return int(binary.NativeEndian.Uint32(info[legacyNameSize+4+field:])) }
	first, policy := at(4*unix.NF_INET_FORWARD), at(20+4*unix.NF_INET_FORWARD)
	out := legacyForward{program: f.program, family: uint8(f.domain)} // AF_* and NFPROTO_* are the same
	var from, to bool
	for offset, n := first, 1; offset <= policy; n++ {
		e, err := f.entry(entries, offset)
		if err != nil {
			return out, err
		}
		if offset == policy {
			out.drops = e.target == "DROP"
			break
		}
		switch {
		case e.target == "DROP" || e.target == "REJECT":
			out.blocks = append(out.blocks, fmt.Sprintf("rule %d (%s, %d packets)", n, e.target, e.packets))
		case e.target == "ACCEPT":
			from, to = from || e.from, to || e.to
		}
		offset += e.size
		out.spares = from && to
	}
	return out, nil
}

type legacyEntry struct {
	size     int
	target   string
	packets  uint64
	from, to bool // accepts by nothing but the interfaces of pods
}

// entry reads struct ipt_entry or ip6t_entry at an offset: addresses and interfaces, two
// offsets, counters, matches, target.
func (f legacyFamily) entry(entries []byte, offset int) (legacyEntry, error) {
	counters := (f.ipSize + 12 + 7) &^ 7
	base := counters + 16
	if offset < 0 || len(entries) < offset+base {
		return legacyEntry{}, errors.New("a rule is cut short")
	}
	b := entries[offset:]
	target, next := int(binary.NativeEndian.Uint16(b[f.ipSize+4:])), int(binary.NativeEndian.Uint16(b[f.ipSize+6:]))
	if target < base || next < target+36 || next > len(b) {
		return legacyEntry{}, errors.New("a rule has wrong offsets")
	}
	e := legacyEntry{size: next, packets: binary.NativeEndian.Uint64(b[counters:])}
	if name := string(b[target+2 : target+2+29]); name[0] != 0 {
		e.target, _, _ = strings.Cut(name, "\x00")
	} else {
		switch int32(binary.NativeEndian.Uint32(b[target+32:])) {
		case -1: // -NF_DROP - 1
			e.target = "DROP"
		case -2: // -NF_ACCEPT - 1
			e.target = "ACCEPT"
		}
	}
	ip := slices.Clone(b[:f.ipSize])
	prefix := func(name, mask int) bool {
		ok := string(ip[name:name+3]) == "nft" && ip[mask+2] != 0 && ip[mask+3] == 0
		clear(ip[name : name+16])
		clear(ip[mask : mask+16])
		return ok
	}
	in, out := prefix(f.iniface, f.iniMask), prefix(f.outiface, f.outiMask)
	only := target == base && !slices.ContainsFunc(ip, func(c byte) bool { return c != 0 })
	e.from, e.to = only && in, only && out
	return e, nil
}
