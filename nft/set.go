package nft

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// A dataType is one of nft's data types; magic is its number in nft's listing (nftables' include/datatype.h).
type dataType struct {
	name  string
	magic uint32
	size  uint32
	host  bool // kept in the byte order of the running machine
}

// The types the sets are made of. classid, not mark, is what meta priority compares with.
var (
	typeVerdict = dataType{name: "verdict", magic: 0xffff_ff00, size: 16}
	typeNFProto = dataType{name: "nf_proto", magic: 2, size: 1, host: true}
	typeIP4     = dataType{name: "ipv4_addr", magic: 7, size: 4}
	typeIP6     = dataType{name: "ipv6_addr", magic: 8, size: 16}
	typeProto   = dataType{name: "inet_proto", magic: 12, size: 1}
	typePort    = dataType{name: "inet_service", magic: 13, size: 2}
	typeICMP    = dataType{name: "icmp_type", magic: 14, size: 1}
	typeMark    = dataType{name: "mark", magic: 19, size: 4, host: true}
	typeClassID = dataType{name: "classid", magic: 23, size: 4, host: true}
	typeICMPv6  = dataType{name: "icmpv6_type", magic: 29, size: 1}
	typeIfname  = dataType{name: "ifname", magic: 41, size: 16, host: true}
)

// setConcat is NFT_SET_CONCAT of linux/netfilter/nf_tables.h, which x/sys/unix does not name.
const setConcat = 0x80

// A setSpec declares one set, or one map when data is set.
type setSpec struct {
	name    string
	key     []dataType
	data    *dataType
	flags   uint32 // NFT_SET_INTERVAL, or NFT_SET_EVAL with NFT_SET_TIMEOUT
	timeout uint32 // seconds
	size    uint32 // elements; 0: unbounded. Where few are certain a fixed table is the faster one, with many it is colder
	comment string
	fixed   []fixedElement // part of the program
}

// A fixedElement is an element that is written with the program and never changes.
type fixedElement struct {
	shown string
	key   []byte
	data  []byte
	goes  *verdict
}

func (s *setSpec) interval() bool { return s.flags&unix.NFT_SET_INTERVAL != 0 }
func (s *setSpec) dynamic() bool  { return s.flags&unix.NFT_SET_EVAL != 0 }
func (s *setSpec) concat() bool   { return len(s.key) > 1 }

// allFlags are the flags as the kernel keeps them.
func (s *setSpec) allFlags() uint32 {
	f := s.flags
	if s.data != nil {
		f |= unix.NFT_SET_MAP
	}
	if s.interval() && s.concat() {
		f |= setConcat
	}
	return f
}

// keyType packs the types as nft does, six bits each.
func (s *setSpec) keyType() (magic, size uint32) {
	for _, t := range s.key {
		magic = magic<<6 | t.magic
		size += (t.size + 3) &^ 3
	}
	if !s.concat() {
		size = s.key[0].size
	}
	return magic, size
}

func (s *setSpec) text(b *strings.Builder) {
	kind, types := "set", make([]string, len(s.key))
	for i, t := range s.key {
		types[i] = t.name
	}
	line := strings.Join(types, " . ")
	if s.data != nil {
		kind = "map"
		line += " : " + s.data.name
	}
	fmt.Fprintf(b, "\t%s %s { type %s;", kind, s.name, line)
	if s.size != 0 {
		fmt.Fprintf(b, " size %d;", s.size)
	}
	switch {
	case s.dynamic():
		fmt.Fprintf(b, " flags dynamic,timeout; timeout %s;", shownSeconds(s.timeout))
	case s.interval():
		b.WriteString(" flags interval;")
	}
	if s.comment != "" {
		fmt.Fprintf(b, " comment %q;", s.comment)
	}
	if len(s.fixed) > 0 {
		shown := make([]string, len(s.fixed))
		for i, e := range s.fixed {
			shown[i] = e.shown
		}
		fmt.Fprintf(b, "\n\t\telements = { %s };\n\t}\n", strings.Join(shown, ", "))
		return
	}
	b.WriteString(" }\n")
}

func shownSeconds(s uint32) string {
	if s%3600 == 0 {
		return fmt.Sprintf("%dh", s/3600)
	}
	return fmt.Sprintf("%dm", s/60)
}
