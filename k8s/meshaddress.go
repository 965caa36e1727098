package k8s

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// maxMeshAddrText bounds the annotation before it is taken apart: an address of each family in
// its longest form, the comma and room for blanks.
const maxMeshAddrText = 128

// convertMeshAddrs reads AnnotationMeshAddresses. What is refused is as if it were absent: the
// node is then sent to at the addresses of its status.
func convertMeshAddrs(s string, f *faults) []netip.Addr {
	if s == "" {
		return nil
	}
	addrs, err := parseMeshAddrs(s)
	if err != nil {
		at := field.NewPath("metadata", "annotations").Key(AnnotationMeshAddresses)
		f.refuse(at, "leave this annotation to the agent of the node", "%v", err)
	}
	return addrs
}

func parseMeshAddrs(s string) ([]netip.Addr, error) {
	if len(s) > maxMeshAddrText {
		return nil, fmt.Errorf("%d bytes: it takes at most %d", len(s), maxMeshAddrText)
	}
	var addrs []netip.Addr
	var v4, v6 int
	for text := range strings.SplitSeq(s, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		switch {
		case err != nil || a.Zone() != "" || a.Is4In6() || !a.IsGlobalUnicast():
			return nil, fmt.Errorf("%s is not a unicast address that other nodes can reach", quote(text))
		case a.Is4():
			v4++
		default:
			v6++
		}
		addrs = append(addrs, a)
	}
	if v4 > 1 || v6 > 1 {
		return nil, errors.New("more than one address of a family")
	}
	return addrs, nil
}
