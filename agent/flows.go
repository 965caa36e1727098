package agent

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// PathFlows answers GET with Flows: the connections after the sequence number in the query
// parameter after, at most limit (default 1000) and the newest. With wait=1 it waits, at
// most 5 s, until there is one.
const PathFlows = "/v1/flows"

// flowRing is how many connections the agent remembers.
const flowRing = 8192

// Flow is one new connection that policy judged on this node.
type Flow struct {
	Seq     uint64         `json:"seq"`
	At      time.Time      `json:"at,omitzero"` // zero: the kernel does not tell
	Verdict string         `json:"verdict"`     // allowed or denied
	Src     netip.AddrPort `json:"src"`
	Dst     netip.AddrPort `json:"dst"` // after a Service's DNAT
	// Protocol is TCP, UDP, SCTP, ICMP, ICMPv6 or a number; for ICMP the port of Dst is
	// type<<8 | code.
	Protocol string `json:"protocol"`
	SrcPod   string `json:"srcPod,omitempty"` // namespace/name
	DstPod   string `json:"dstPod,omitempty"`
	// Policy is what decides such a flow now: namespace/name and rule, or the isolating
	// policies of a denial.
	Policy string `json:"policy,omitempty"`
	// Changed: policy judges such a flow otherwise now than it was judged then.
	Changed bool `json:"changed,omitempty"`
}

// Flows is a part of the ring.
type Flows struct {
	Flows []Flow `json:"flows"`
	Next  uint64 `json:"next"` // for the query parameter after
	// Missed are connections that were overwritten before they were asked for.
	Missed uint64 `json:"missed,omitempty"`
	// Lost are messages the kernel could not deliver since the agent's start.
	Lost uint64 `json:"lost,omitempty"`
	// SampledOneIn is greater than 1 while new connections are too many to watch all.
	SampledOneIn uint32 `json:"sampledOneIn"`
}

// rawFlow is a connection as the kernel told it: names are looked up when it is read.
type rawFlow struct {
	at         time.Time
	flow       policy.Flow
	clientPort uint16
	denied     bool
}

// flowLog is the ring. Its writers are the watchers of flows_watch.go.
type flowLog struct {
	mu      sync.Mutex
	ring    [flowRing]rawFlow
	next    uint64        // sequence number of the next connection, from 1
	changed chan struct{} // closed and replaced when one is added
	lost    uint64
	missed  uint64 // overwritten before a reader that followed had them
	oneIn   uint32
}

func newFlowLog() *flowLog { return &flowLog{next: 1, changed: make(chan struct{}), oneIn: 1} }

func (l *flowLog) add(f rawFlow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring[l.next%flowRing] = f
	l.next++
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *flowLog) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost++
}

func (l *flowLog) sample(oneIn uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.oneIn = oneIn
}

func (l *flowLog) drops() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.missed
}

// since copies what came after seq, at most limit.
func (l *flowLog) since(seq uint64, limit int) (raw []rawFlow, out Flows, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := max(seq+1, 1)
	if oldest := l.next - min(l.next-1, flowRing); first < oldest {
		if seq > 0 {
			out.Missed = oldest - first
		}
		first = oldest
	}
	if first+uint64(limit) < l.next {
		if seq > 0 {
			out.Missed += l.next - uint64(limit) - first
		}
		first = l.next - uint64(limit)
	}
	l.missed += out.Missed
	for s := first; s < l.next; s++ {
		raw = append(raw, l.ring[s%flowRing])
	}
	out.Next, out.Lost, out.SampledOneIn = l.next-1, l.lost, l.oneIn
	return raw, out, l.changed
}

// ProtocolName is the protocol as Kubernetes writes it, "" for one that it does not name.
func ProtocolName(p policy.Protocol) string {
	switch p {
	case policy.TCP:
		return "TCP"
	case policy.UDP:
		return "UDP"
	case policy.SCTP:
		return "SCTP"
	case policy.ICMP:
		return "ICMP"
	case policy.ICMPv6:
		return "ICMPv6"
	}
	return ""
}

// flows answers PathFlows.
func (w *flowWatch) flows(rw http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	after, _ := strconv.ParseUint(q.Get("after"), 10, 64) // nothing or nonsense: from the oldest
	limit, err := strconv.Atoi(q.Get("limit"))
	if err != nil || limit < 1 || limit > flowRing {
		limit = 1000
	}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	raw, out, changed := w.log.since(after, limit)
	for len(raw) == 0 && q.Get("wait") == "1" && ctx.Err() == nil {
		select {
		case <-changed:
		case <-ctx.Done():
		}
		raw, out, changed = w.log.since(after, limit)
	}
	names, err := w.names.current(r.Context())
	if err != nil {
		fail(rw, http.StatusServiceUnavailable, &cni.Error{Code: codeTryAgain, Message: err.Error()})
		return
	}
	out.Flows = make([]Flow, 0, len(raw))
	for i, f := range raw {
		if names.concerns(w.node, f) {
			out.Flows = append(out.Flows, names.describe(f, out.Next-uint64(len(raw)-1-i)))
		}
	}
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(out) // the client is gone if this fails
}
