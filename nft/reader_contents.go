package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// Denial is one entry of denied4 or denied6: who was refused, how often.
type Denial struct {
	Profile  uint32     `json:"profile"`
	Src, Dst netip.Addr `json:"-"`
	Packets  uint64     `json:"packets"`
	Bytes    uint64     `json:"bytes"`
}

// Denials reads the denied sets.
func (r *Reader) Denials(ctx context.Context) ([]Denial, error) {
	var out []Denial
	for _, family := range []struct {
		set  string
		size int
	}{{"denied4", 4}, {"denied6", 16}} {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		elements, _, err := r.dumpOnce(family.set) // packets add to it at any time
		if err != nil {
			return nil, err
		}
		for _, e := range elements {
			if len(e.key) != 4+2*family.size {
				return nil, fmt.Errorf("set %s: key of %d bytes, want %d: the table is not this version's", family.set, len(e.key), 4+2*family.size)
			}
			src, _ := netip.AddrFromSlice(e.key[4 : 4+family.size])
			dst, _ := netip.AddrFromSlice(e.key[4+family.size:])
			out = append(out, Denial{Profile: binary.NativeEndian.Uint32(e.key), Src: src, Dst: dst, Packets: e.packets, Bytes: e.bytes})
		}
	}
	return out, nil
}

// Direction is the direction of policy that denied, by the number range of Profile.
func (d Denial) Direction() policy.Direction {
	if d.Profile >= UnknownIngressProfile {
		return policy.Ingress
	}
	return policy.Egress
}

// Sizes counts the elements of every set and map of the table; it may be off while the kernel resizes one.
func (r *Reader) Sizes(ctx context.Context) (map[string]int, error) {
	out := map[string]int{}
	for set := range r.sets {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		out[set] = 0
		elements, _, err := r.dumpOnce(set)
		if err != nil {
			return nil, err
		}
		for _, e := range elements {
			if e.flags&unix.NFT_SET_ELEM_INTERVAL_END == 0 {
				out[set]++
			}
		}
	}
	return out, nil
}

// Epoch is the mark that connections get now when they are allowed.
func (r *Reader) Epoch(ctx context.Context) (uint32, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	elements, err := r.dump("stamp")
	if err != nil {
		return 0, err
	}
	for _, e := range elements {
		if len(e.data) == 4 {
			return binary.NativeEndian.Uint32(e.data), nil
		}
	}
	return 0, errors.New("map stamp is empty: the table is not whole")
}

// Tables reads every element that policy owns.
func (r *Reader) Tables(ctx context.Context) (policy.Tables, error) {
	out := policy.Tables{}
	for _, m := range elementMaps() {
		for _, set := range setsOf(m) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			elements, err := r.dump(set)
			if err != nil {
				return nil, err
			}
			if err := addElements(out, m, elements); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}
