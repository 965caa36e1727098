package agent

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// PathEnforced answers GET with Enforced for the NetworkPolicy in the query parameter policy
// (namespace/name). With wait=1 it waits, at most 5 s, until the generation in the
// query parameter generation, or a newer one, is in force; with gone=1 until none is. With
// fresh=1 that generation is the one the API server has now.
const PathEnforced = "/v1/enforced"

// Enforced is what this node's kernel enforces of one policy.
type Enforced struct {
	Policy           string    `json:"policy"`
	InForce          bool      `json:"inForce"`
	Known            bool      `json:"known"` // the source lists it
	Generation       int64     `json:"generation"`
	Wanted           int64     `json:"wanted,omitempty"` // what a fresh read returned
	KernelGeneration uint32    `json:"kernelGeneration"`
	At               time.Time `json:"at,omitzero"`
	Micros           int64     `json:"micros"` // from the event to the kernel's acknowledgement
}

// enforcedInterval is how often a waiting request looks: it costs the loop a map lookup.
const enforcedInterval = 2 * time.Millisecond

func (l *loop) enforcedPolicy(ctx context.Context, name string) (Enforced, error) {
	e := Enforced{Policy: name}
	namespace, policyName, _ := strings.Cut(name, "/")
	id := policy.PolicyID{Kind: "NetworkPolicy", Name: policy.Name{Namespace: namespace, Name: policyName}}
	err := l.do(ctx, func() {
		got, ok := l.commits.enforced[id]
		e.Known = l.inv.policies[id] != nil
		e.InForce, e.Generation, e.KernelGeneration, e.At, e.Micros = ok, got.generation, got.kernel, got.at, got.micros
	})
	return e, err
}

// GenerationFunc reads metadata.generation of a NetworkPolicy from where the objects come from
// (k8s.Cluster.PolicyGeneration, a quorum read).
type GenerationFunc func(context.Context, policy.Name) (int64, error)

// freshGeneration is what the query asks for: 0 for any, or where nobody counts generations.
func freshGeneration(ctx context.Context, q url.Values, read GenerationFunc) (int64, error) {
	if q.Get("fresh") != "1" || read == nil {
		n, _ := strconv.ParseInt(q.Get("generation"), 10, 64) // nothing or nonsense: any generation
		return n, nil
	}
	namespace, name, _ := strings.Cut(q.Get("policy"), "/")
	return read(ctx, policy.Name{Namespace: namespace, Name: name})
}

func (l *loop) serveEnforced(w http.ResponseWriter, r *http.Request, read GenerationFunc) {
	q := r.URL.Query()
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	want, err := freshGeneration(ctx, q, read)
	if err != nil {
		fail(w, http.StatusBadGateway, &cni.Error{Code: codeTryAgain, Message: err.Error()})
		return
	}
	tick := time.NewTicker(enforcedInterval)
	defer tick.Stop()
	for {
		e, err := l.enforcedPolicy(r.Context(), q.Get("policy"))
		if err != nil {
			fail(w, http.StatusServiceUnavailable, &cni.Error{Code: codeTryAgain, Message: err.Error()})
			return
		}
		e.Wanted = want
		done := e.InForce && e.Generation >= want
		if q.Get("gone") == "1" {
			done = !e.InForce && !e.Known
		}
		if done || q.Get("wait") != "1" || ctx.Err() != nil {
			reply(w, e)
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// servePods answers PathPods, with local=1 those of this node only.
func (l *loop) servePods(w http.ResponseWriter, r *http.Request) {
	list, err := l.pods(r.Context())
	if err != nil {
		fail(w, http.StatusServiceUnavailable, &cni.Error{Code: codeTryAgain, Message: err.Error()})
		return
	}
	if r.URL.Query().Get("local") == "1" {
		list = slices.DeleteFunc(list, func(p Pod) bool { return !p.Local })
	}
	reply(w, list)
}
