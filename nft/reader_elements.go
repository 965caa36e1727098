package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// rawElement is one element as the kernel sends it.
type rawElement struct {
	key, keyEnd, data []byte
	flags             uint32
	verdict           int32  // of a verdict map
	chain             string // that the verdict names
	packets, bytes    uint64
	comment           string
}

// decodeElements reads one NFT_MSG_NEWSETELEM.
func decodeElements(m netlink.Message) ([]rawElement, error) {
	if len(m.Data) < 4 {
		return nil, errors.New("message of elements is cut short")
	}
	var out []rawElement
	d, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return nil, fmt.Errorf("decode elements: %w", err)
	}
	for d.Next() {
		if d.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		d.Nested(func(d *netlink.AttributeDecoder) error {
			for d.Next() {
				var e rawElement
				d.Nested(e.decode)
				out = append(out, e)
			}
			return nil
		})
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("decode elements: %w", err)
	}
	return out, nil
}

func (e *rawElement) decode(d *netlink.AttributeDecoder) error {
	d.ByteOrder = binary.BigEndian
	value := func(into *[]byte) func(*netlink.AttributeDecoder) error {
		return func(d *netlink.AttributeDecoder) error {
			for d.Next() {
				if d.Type() == unix.NFTA_DATA_VALUE {
					*into = slices.Clone(d.Bytes())
				}
			}
			return nil
		}
	}
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			d.Nested(value(&e.key))
		case nftaSetElemKeyEnd:
			d.Nested(value(&e.keyEnd))
		case unix.NFTA_SET_ELEM_DATA:
			d.Nested(e.decodeData)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.flags = d.Uint32()
		case unix.NFTA_SET_ELEM_EXPR:
			d.Nested(e.decodeCounter)
		case unix.NFTA_SET_ELEM_USERDATA:
			e.comment = elementComment(d.Bytes())
		}
	}
	return nil
}

// decodeData reads a map's value or verdict.
func (e *rawElement) decodeData(d *netlink.AttributeDecoder) error {
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_DATA_VALUE:
			e.data = slices.Clone(d.Bytes())
		case unix.NFTA_DATA_VERDICT:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				d.ByteOrder = binary.BigEndian
				for d.Next() {
					switch d.Type() {
					case unix.NFTA_VERDICT_CODE:
						e.verdict = int32(d.Uint32())
					case unix.NFTA_VERDICT_CHAIN:
						e.chain = d.String()
					}
				}
				return nil
			})
		}
	}
	return nil
}

// Attributes that golang.org/x/sys/unix does not name (linux/netfilter/nf_tables.h).
const (
	nftaSetElemKeyEnd      = 10
	nftaSetElemExpressions = 11
)

// decodeCounter reads NFTA_EXPR_NAME and NFTA_EXPR_DATA of a counter.
func (e *rawElement) decodeCounter(d *netlink.AttributeDecoder) error {
	name := ""
	for d.Next() {
		switch {
		case d.Type() == unix.NFTA_EXPR_NAME:
			name = d.String()
		case d.Type() == unix.NFTA_EXPR_DATA && name == "counter":
			d.Nested(func(d *netlink.AttributeDecoder) error {
				d.ByteOrder = binary.BigEndian
				for d.Next() {
					switch d.Type() {
					case unix.NFTA_COUNTER_BYTES:
						e.bytes = d.Uint64()
					case unix.NFTA_COUNTER_PACKETS:
						e.packets = d.Uint64()
					}
				}
				return nil
			})
		}
	}
	return nil
}

// elementComment finds the comment in an element's user data: type 0, length, text and NUL
// (libnftnl, NFTNL_UDATA_SET_ELEM_COMMENT).
func elementComment(b []byte) string {
	for len(b) >= 2 && len(b) >= 2+int(b[1]) {
		if n := int(b[1]); b[0] == 0 && n > 0 {
			return string(b[2 : 2+n-1])
		}
		b = b[2+int(b[1]):]
	}
	return ""
}
