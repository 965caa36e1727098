package agent

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Paths of the local API beside those of package cni. All are GET and answer JSON.
const (
	PathStatus   = "/v1/status"   // Status
	PathPods     = "/v1/pods"     // []Pod
	PathPolicies = "/v1/policies" // []Policy
	PathSnapshot = "/v1/snapshot" // Snapshot
)

// Status is the agent at one instant.
type Status struct {
	Node        string         `json:"node"`
	Network     Network        `json:"network"`
	Ready       bool           `json:"ready"`
	Reason      string         `json:"reason,omitempty"`
	Started     time.Time      `json:"started"`
	Generation  uint32         `json:"generation"` // of nf_tables after the last own commit
	Namespaces  int            `json:"namespaces"`
	Pods        int            `json:"pods"`
	Policies    int            `json:"policies"`
	Nodes       int            `json:"nodes"`
	Attachments int            `json:"attachments"`
	Waiting     int            `json:"waiting"` // attachments whose pod the source has not shown yet
	PodNetworks []netip.Prefix `json:"podNetworks"`
	Commits     uint64         `json:"commits"`
	LastCommit  *Commit        `json:"lastCommit,omitempty"`
	Recent      []Commit       `json:"recent,omitempty"`
	Problems    []k8s.Problem  `json:"problems,omitempty"`
	// EventToKernel and Kernel are the times of all commits since the start.
	EventToKernel Histogram `json:"eventToKernel"`
	Kernel        Histogram `json:"kernel"`
}

// Commit is one change that reached the kernel.
type Commit struct {
	At           time.Time `json:"at"`
	Events       int       `json:"events"`
	Transactions int       `json:"transactions"`
	Elements     int       `json:"elements"`
	Generation   uint32    `json:"generation"`
	Micros       int64     `json:"micros"`       // from the events to the kernel's last acknowledgement
	KernelMicros int64     `json:"kernelMicros"` // of these, the transactions
	Resync       bool      `json:"resync,omitempty"`
	Error        string    `json:"error,omitempty"`
}

// Pod is one pod as policy sees it.
type Pod struct {
	policy.Pod
	Local      bool     `json:"local"`
	Interfaces []string `json:"interfaces,omitempty"` // host side
}

// Policy is one policy and when the kernel took it.
type Policy struct {
	policy.Policy
	EnforcedGeneration int64     `json:"enforcedGeneration"` // metadata.generation
	KernelGeneration   uint32    `json:"kernelGeneration"`
	EnforcedAt         time.Time `json:"enforcedAt,omitzero"`
	Micros             int64     `json:"micros"` // from the event to the kernel's acknowledgement
	LocalPods          int       `json:"localPods"`
}

// Snapshot is everything the oracle needs to answer for this node.
type Snapshot struct {
	At      time.Time       `json:"at"`
	Node    string          `json:"node"`
	Cluster *policy.Cluster `json:"cluster"`
	// Status and Enforced are in the file only, where nobody can be asked for them.
	Status   *Status    `json:"status,omitempty"`
	Enforced []Enforced `json:"enforced,omitempty"`
}

// Policies are the cluster's policies with what the file says of their enforcement.
func (s Snapshot) Policies() []Policy {
	enforced := map[string]Enforced{}
	for _, e := range s.Enforced {
		enforced[e.Policy] = e
	}
	out := make([]Policy, 0, len(s.Cluster.Policies))
	for _, p := range s.Cluster.Policies {
		e := enforced[p.ID.String()]
		out = append(out, Policy{Policy: p, EnforcedGeneration: e.Generation, KernelGeneration: e.KernelGeneration, EnforcedAt: e.At, Micros: e.Micros})
	}
	namespaces := map[string]policy.Labels{}
	for _, ns := range s.Cluster.Namespaces {
		namespaces[ns.Name] = ns.Labels
	}
	countLocal(out, localPods(s.Cluster.Pods, s.Node), namespaces)
	return out
}

const recentCommits = 32

// commitLog remembers the last commits and what each policy's last one was.
type commitLog struct {
	total    uint64
	written  uint64   // total when the snapshot file was written
	recent   []Commit // oldest first
	enforced map[policy.PolicyID]enforcement
	measures *measures // nil in tests of the loop alone
}

type enforcement struct {
	generation int64
	kernel     uint32
	at         time.Time
	micros     int64
}

func (l *loop) record(began time.Time, b *batch, r nft.Receipt, err error) {
	c := Commit{
		At: time.Now(), Events: len(b.events), Resync: b.replace, Transactions: r.Transactions, Elements: r.Elements,
		Generation: r.Generation, Micros: time.Since(began).Microseconds(), KernelMicros: r.Took.Microseconds(),
	}
	if err != nil {
		c.Error = err.Error()
	} else {
		l.enforced(b, c)
	}
	l.commits.total++
	l.commits.measures.committed(c)
	if len(l.commits.recent) == recentCommits {
		l.commits.recent = slices.Delete(l.commits.recent, 0, 1)
	}
	l.commits.recent = append(l.commits.recent, c)
	l.log.Debug("commit", "events", c.Events, "transactions", c.Transactions, "elements", c.Elements,
		"micros", c.Micros, "generation", c.Generation, "err", err)
}

// enforced notes the policies of a batch that the kernel acknowledged.
func (l *loop) enforced(b *batch, c Commit) {
	if l.commits.enforced == nil {
		l.commits.enforced = map[policy.PolicyID]enforcement{}
	}
	note := func(p *policy.Policy) {
		l.commits.enforced[p.ID] = enforcement{generation: p.Generation, kernel: c.Generation, at: c.At, micros: c.Micros}
	}
	if b.replace {
		l.commits.enforced = make(map[policy.PolicyID]enforcement, len(l.inv.policies))
		for _, p := range l.inv.policies {
			note(p)
		}
		return
	}
	for _, e := range b.events {
		switch {
		case e.Policy != nil && e.Delete:
			delete(l.commits.enforced, e.Policy.ID)
		case e.Policy != nil:
			note(e.Policy)
		}
	}
}

// status and the other answers are made in the loop's goroutine from copies, so that
// encoding them does not hold up a pod.
func (l *loop) status(ctx context.Context) (Status, error) {
	var s Status
	err := l.do(ctx, func() { s = l.statusNow() })
	s.EventToKernel, s.Kernel = l.commits.measures.latency()
	return s, err
}

// statusNow is all of status but the histograms; the loop's goroutine calls it.
func (l *loop) statusNow() Status {
	s := Status{
		Node: l.cfg.Node, Network: l.cfg.Network, Generation: l.generation,
		Namespaces: len(l.inv.namespaces), Pods: len(l.inv.pods), Policies: len(l.inv.policies), Nodes: len(l.inv.nodes),
		Attachments: len(l.inv.attached), PodNetworks: l.networks, Commits: l.commits.total,
		Recent: slices.Clone(l.commits.recent), Problems: slices.Clone(l.problems),
	}
	for _, w := range l.waiting {
		s.Waiting += len(w)
	}
	s.Ready, s.Reason = l.ready()
	if n := len(s.Recent); n > 0 {
		s.LastCommit = &s.Recent[n-1]
	}
	return s
}

func (l *loop) ready() (bool, string) {
	switch {
	case l.broken != nil:
		return false, "the kernel's table could not be brought in line: " + l.broken.Error()
	case !l.synced && (!l.loaded || l.live): // else static pods can start by the last known objects
		return false, errNotSynced.Error()
	}
	return true, ""
}

func (l *loop) pods(ctx context.Context) ([]Pod, error) {
	var out []Pod
	err := l.do(ctx, func() {
		for _, p := range l.inv.cluster().Pods {
			out = append(out, Pod{Pod: p, Local: p.Node == l.cfg.Node, Interfaces: l.inv.interfaces(p)})
		}
	})
	slices.SortFunc(out, func(a, b Pod) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	return out, err
}

// interfaces are the host interfaces that hold an address of p.
func (v *inventory) interfaces(p policy.Pod) []string {
	var out []string
	for _, addr := range p.Addrs {
		if on := v.holders[addr]; p.Attached && on != "" && !slices.Contains(out, on) {
			out = append(out, on)
		}
	}
	return out
}

func (l *loop) policies(ctx context.Context) ([]Policy, error) {
	var out []Policy
	var local []policy.Pod
	namespaces := map[string]policy.Labels{}
	err := l.do(ctx, func() {
		for id, p := range l.inv.policies {
			e := l.commits.enforced[id]
			out = append(out, Policy{Policy: *p, EnforcedGeneration: e.generation, KernelGeneration: e.kernel, EnforcedAt: e.at, Micros: e.micros})
		}
		local = localPods(l.inv.cluster().Pods, l.cfg.Node)
		for n, ns := range l.inv.namespaces {
			namespaces[n] = ns.Labels
		}
	})
	countLocal(out, local, namespaces)
	slices.SortFunc(out, func(a, b Policy) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return out, err
}

// localPods are the pods of node that policies select.
func localPods(pods []policy.Pod, node string) []policy.Pod {
	var out []policy.Pod
	for _, p := range pods {
		if p.Node == node && !p.HostNetwork && !p.Finished {
			out = append(out, p)
		}
	}
	return out
}

func countLocal(list []Policy, local []policy.Pod, namespaces map[string]policy.Labels) {
	for i := range list {
		for _, p := range local {
			if selects(list[i].Subject, p, namespaces) {
				list[i].LocalPods++
			}
		}
	}
}

func selects(s policy.PodSelector, p policy.Pod, namespaces map[string]policy.Labels) bool {
	if s.Namespace != "" {
		return s.Namespace == p.Namespace && s.Pods.Matches(p.Labels)
	}
	return s.Namespaces.Matches(namespaces[p.Namespace]) && s.Pods.Matches(p.Labels)
}

func (l *loop) snapshot(ctx context.Context) (Snapshot, error) {
	var s Snapshot
	err := l.do(ctx, func() { s = Snapshot{At: time.Now(), Node: l.cfg.Node, Cluster: l.inv.cluster()} })
	return s, err
}

// wholeSnapshot is snapshot with what only the agent can tell; the loop's goroutine calls it.
func (l *loop) wholeSnapshot() snapshotFile {
	status := l.statusNow()
	s := snapshotFile{at: time.Now(), objects: l.inv.objects(), status: &status}
	for id, e := range l.commits.enforced {
		s.enforced = append(s.enforced, Enforced{Policy: id.String(), InForce: true, Known: l.inv.policies[id] != nil,
			Generation: e.generation, KernelGeneration: e.kernel, At: e.at, Micros: e.micros})
	}
	return s
}
