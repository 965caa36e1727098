package agent

import (
	"context"
	"net/http"
	"time"

	"github.com/nftcni/nftcni/cni"
)

// Paths of the mesh.
const (
	PathMesh      = "/v1/mesh"       // GET: MeshStatus
	PathRotateKey = "/v1/rotate-key" // POST without a body: makes a new WireGuard key; MeshStatus
)

// MeshStatus is how the pods of other nodes are reached.
type MeshStatus struct {
	Report    cni.Report      `json:"report"`
	Rotation  cni.Rotation    `json:"rotation"`
	PublicKey string          `json:"publicKey,omitempty"`
	Probes    []cni.PathProbe `json:"probes,omitempty"`     // what really passes on the paths
	ProbeErr  string          `json:"probeError,omitempty"` // why that is not known
}

const (
	// oldKeyQuiet is how long nothing may come with an old key before it goes: longer than a
	// WireGuard session lives without a new handshake (REJECT_AFTER_TIME, 180 s), so that a peer that
	// still uses it has been heard.
	oldKeyQuiet = 4 * time.Minute
	retireLook  = 10 * time.Second
)

// retirement decides when the old key of a rotation is out of use: every peer is reached with the new
// one, and nothing comes with the old one any more. So no node has to say in the API that
// it has moved.
type retirement struct {
	applied  bool // the newest list of nodes is in force: nobody is missing from the count
	since    time.Time
	received int64
}

func (r *retirement) due(now time.Time, x cni.Rotation) bool {
	if !r.applied || !x.Active || x.Moving > 0 || r.since.IsZero() || x.Received != r.received {
		r.since, r.received = now, x.Received
		return false
	}
	return now.Sub(r.since) >= oldKeyQuiet
}

// retire ends a rotation that is through, and returns when to look again; 0: there is none.
func (m *mesh) retire(ctx context.Context) time.Duration {
	x, err := m.cni.Rotation()
	if err == nil && !x.Active {
		m.retiring.since = time.Time{}
		return 0
	}
	if err == nil && m.retiring.due(m.now(), x) {
		if _, err = m.cni.RetireKey(ctx); err == nil {
			m.log.Info("the old WireGuard key is out of use and was removed")
			m.retiring.since = time.Time{}
			return 0
		}
	}
	if err != nil && ctx.Err() == nil {
		m.log.Error("retire the old WireGuard key; trying again", "err", err)
	}
	return retireLook
}

func (m *mesh) status() (MeshStatus, error) {
	r, err := m.cni.Rotation()
	s := MeshStatus{Report: m.cni.Report(), Rotation: r, PublicKey: m.cni.PublicKey()}
	s.Probes, s.ProbeErr = m.probes.results()
	return s, err
}

// serve registers the mesh's paths.
func (m *mesh) serve(mux *http.ServeMux) {
	mux.HandleFunc("GET "+PathMesh, query(func(context.Context) (MeshStatus, error) { return m.status() }))
	mux.HandleFunc("POST "+PathRotateKey, func(w http.ResponseWriter, r *http.Request) {
		if _, err := m.cni.RotateKey(r.Context()); err != nil {
			fail(w, http.StatusConflict, &cni.Error{Message: err.Error()})
			return
		}
		m.log.Info("made a new WireGuard key: peers move to it as they learn of it")
		m.wakeUp()
		query(func(context.Context) (MeshStatus, error) { return m.status() })(w, r)
	})
}
