package ipam

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"os"
)

// checkPages walks the pages of a bbolt file before bbolt does: a page that leads back to
// itself, which stale pages after a power cut can make, has bbolt walk for ever. The
// format is that of bbolt 1.x (internal/common), version 2; all numbers are those of the
// machine, and files do not travel between machines.
func checkPages(b []byte) error {
	w := pageWalk{b: b, size: uint64(os.Getpagesize()), seen: map[uint64]bool{}}
	var meta []byte
	newest := uint64(0)
	for n := range uint64(2) {
		if m := w.meta(n); m != nil && (meta == nil || binary.NativeEndian.Uint64(m[48:]) > newest) {
			meta, newest = m, binary.NativeEndian.Uint64(m[48:])
		}
	}
	if meta == nil {
		return fmt.Errorf("none of the two meta pages is whole")
	}
	w.high = binary.NativeEndian.Uint64(meta[40:])
	if w.high > uint64(len(b))/w.size {
		return fmt.Errorf("file has %d bytes, its meta page says %d pages", len(b), w.high)
	}
	return w.page(binary.NativeEndian.Uint64(meta[16:]))
}

const (
	pageHeader  = 16 // id 8, flags 2, count 2, overflow 4
	pageElement = 16
	flagBranch  = 1
	flagLeaf    = 2
	flagBucket  = 1 // of a leaf's element: the value is a bucket
)

type pageWalk struct {
	b          []byte
	size, high uint64
	seen       map[uint64]bool
}

// meta returns the body of meta page n, nil when it is not whole.
func (w *pageWalk) meta(n uint64) []byte {
	const magic, version, length = 0xED0CDAED, 2, 64
	at := n*w.size + pageHeader
	if uint64(len(w.b)) < at+length {
		return nil
	}
	m := w.b[at : at+length]
	sum := fnv.New64a()
	_, _ = sum.Write(m[:56])
	if binary.NativeEndian.Uint32(m) != magic || binary.NativeEndian.Uint32(m[4:]) != version ||
		uint64(binary.NativeEndian.Uint32(m[8:])) != w.size || binary.NativeEndian.Uint64(m[56:]) != sum.Sum64() {
		return nil
	}
	return m
}

func (w *pageWalk) page(id uint64) error {
	if id < 2 || id >= w.high {
		return fmt.Errorf("page %d does not exist", id)
	}
	head := w.b[id*w.size:]
	span := uint64(binary.NativeEndian.Uint32(head[12:])) + 1
	if binary.NativeEndian.Uint64(head) != id || span > w.high-id {
		return fmt.Errorf("page %d is another one, or runs over the end", id)
	}
	for n := range span {
		if w.seen[id+n] {
			return fmt.Errorf("page %d is used twice", id+n)
		}
		w.seen[id+n] = true
	}
	return w.elements(id, head[:span*w.size])
}

// elements checks one page, or the page inside of a small bucket.
func (w *pageWalk) elements(id uint64, p []byte) error {
	if len(p) < pageHeader {
		return fmt.Errorf("page %d is cut", id)
	}
	flags, count := binary.NativeEndian.Uint16(p[8:]), uint64(binary.NativeEndian.Uint16(p[10:]))
	if flags != flagBranch && flags != flagLeaf || flags == flagBranch && count == 0 || pageHeader+count*pageElement > uint64(len(p)) {
		return fmt.Errorf("page %d has flags %#x and %d elements", id, flags, count)
	}
	var last []byte
	for n := range count {
		at := pageHeader + n*pageElement
		key, value, err := element(p, at, flags)
		if err != nil {
			return fmt.Errorf("page %d: %w", id, err)
		}
		if n > 0 && bytes.Compare(last, key) >= 0 {
			return fmt.Errorf("page %d: keys are out of order", id)
		}
		last = key
		if err := w.below(id, p[at:], flags, value); err != nil {
			return err
		}
	}
	return nil
}

func element(p []byte, at uint64, flags uint16) (key, value []byte, err error) {
	e := p[at:]
	pos, ksize, vsize := binary.NativeEndian.Uint32(e), binary.NativeEndian.Uint32(e[4:]), uint32(0)
	if flags == flagLeaf {
		pos, ksize, vsize = binary.NativeEndian.Uint32(e[4:]), binary.NativeEndian.Uint32(e[8:]), binary.NativeEndian.Uint32(e[12:])
	}
	start := at + uint64(pos)
	end := start + uint64(ksize) + uint64(vsize)
	if end > uint64(len(p)) {
		return nil, nil, fmt.Errorf("element at %d runs over the end", at)
	}
	return p[start : start+uint64(ksize)], p[start+uint64(ksize) : end], nil
}

// below follows an element that leads to another page.
func (w *pageWalk) below(id uint64, e []byte, flags uint16, value []byte) error {
	if flags == flagBranch {
		return w.page(binary.NativeEndian.Uint64(e[8:]))
	}
	if binary.NativeEndian.Uint32(e)&flagBucket == 0 {
		return nil
	}
	if len(value) < 16 {
		return fmt.Errorf("page %d: bucket is cut", id)
	}
	if root := binary.NativeEndian.Uint64(value); root != 0 {
		return w.page(root)
	}
	return w.elements(id, value[16:])
}
