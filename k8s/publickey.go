package k8s

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

const (
	publicKeyBytes = 32 // of Curve25519
	maxPublicKeys  = 2  // the old one and the new one
	// maxPublicKeyText bounds the annotation before it is taken apart: two keys of 44
	// characters with parity, and room for blanks.
	maxPublicKeyText = 128
)

// convertPublicKeys reads AnnotationPublicKey. What is refused is as if it were absent:
// nodes that encrypt send such a node nothing.
func convertPublicKeys(s string, f *faults) string {
	if s == "" {
		return ""
	}
	at := field.NewPath("metadata", "annotations").Key(AnnotationPublicKey)
	const remedy = "leave this annotation to the agent of the node"
	if len(s) > maxPublicKeyText {
		f.refuse(at, remedy, "%d bytes: it takes at most %d", len(s), maxPublicKeyText)
		return ""
	}
	fields := strings.Fields(s)
	if err := checkPublicKeys(fields); err != nil {
		f.refuse(at, remedy, "%s: %v", quote(s), err)
		return ""
	}
	return strings.Join(fields, " ")
}

// checkPublicKeys checks the keys' form, not that they are points of the curve:
// WireGuard takes any 32 bytes but zero.
func checkPublicKeys(fields []string) error {
	if len(fields) == 0 || len(fields) > maxPublicKeys {
		return fmt.Errorf("%d keys: it takes 1 or %d", len(fields), maxPublicKeys)
	}
	var parities [maxPublicKeys]bool
	for _, text := range fields {
		parity, key, ok := strings.Cut(text, ":")
		if !ok {
			parity, key = "0", text
		}
		if parity != "0" && parity != "1" {
			return errors.New("the parity before the key is not 0 or 1")
		}
		i := parity[0] - '0'
		if parities[i] {
			return fmt.Errorf("two keys of parity %s", parity)
		}
		parities[i] = true
		b, err := base64.StdEncoding.Strict().DecodeString(key)
		if err != nil || len(b) != publicKeyBytes || [publicKeyBytes]byte(b) == [publicKeyBytes]byte{} {
			return fmt.Errorf("a key is not %d bytes in base64, or all zero", publicKeyBytes)
		}
	}
	return nil
}
