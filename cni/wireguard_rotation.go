package cni

import (
	"errors"
	"fmt"
	"io/fs"
)

// Rotation is how far a rotation of this node's WireGuard key is.
type Rotation struct {
	Active bool `json:"active"` // the old key is still there
	// Moving counts the peers that are not yet reached with the newest keys of both sides, whoever
	// of the two rotates.
	Moving int `json:"moving"`
	// Received is the bytes that came with the old key since its devices were made: what still
	// grows when all have moved is a peer that has not.
	Received int64 `json:"received"`
}

// Rotation asks the devices of the old key. The zero value: none is going on.
func (m *Mesh) Rotation() (Rotation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wg == nil {
		return Rotation{}, nil
	}
	r := Rotation{Moving: m.report.Rotating}
	parities := m.wg.keys.parities()
	if len(parities) == 1 {
		return r, nil
	}
	r.Active = true
	old := parities[1]
	for _, name := range []string{wireGuardDevice(2 * old), wireGuardDevice(2*old + 1)} {
		d, err := m.wg.client.Device(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no peer has a key of that parity
		}
		if err != nil {
			return r, fmt.Errorf("read %s: %w", name, err)
		}
		for _, p := range d.Peers {
			r.Received += p.ReceiveBytes
		}
	}
	return r, nil
}
