package agent

import (
	"context"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// collector reads everything when it is scraped; nothing is counted twice.
type collector struct {
	o    *observers
	desc map[string]*prometheus.Desc

	mu     sync.Mutex
	denied map[deniedKey]uint64 // packets of the denied sets when last read
	total  map[[2]string]uint64 // direction and policies -> packets since the start
}

type deniedKey struct {
	profile  uint32
	src, dst string
}

func newCollector(o *observers) *collector {
	c := &collector{o: o, desc: map[string]*prometheus.Desc{}, denied: map[deniedKey]uint64{}, total: map[[2]string]uint64{}}
	for _, d := range []struct {
		name, help string
		labels     []string
	}{
		{"build_info", "Version of the agent; the value is 1.", []string{"version", "goversion"}},
		{"ready", "1 when the agent enforces the complete state of its source.", nil},
		{"event_to_kernel_seconds", "Time from the events of a change to the kernel's last acknowledgement.", nil},
		{"kernel_commit_seconds", "Of event_to_kernel_seconds, the kernel's transactions.", nil},
		{"transactions_total", "Transactions of nf_tables.", nil},
		{"commit_failures_total", "Changes that the kernel refused; the table is then read back and compared.", nil},
		{"epoch", "Number of the live epoch; each change of it has established connections judged again.", nil},
		{"elements", "Elements of the table by set.", []string{"set"}},
		{"cni_request_seconds", "Time of the agent's part of CNI ADD and DEL.", []string{"verb"}},
		{"cni_request_errors_total", "CNI ADD and DEL that the agent refused.", []string{"verb"}},
		{"attachments", "Pod interfaces attached on this node.", nil},
		{"attachments_waiting", "Attachments whose pod the source has not shown yet.", nil},
		{"objects", "Objects the agent knows.", []string{"kind"}},
		{"problems", "Objects that are not in force as written.", []string{"severity"}},
		{"leases", "Leased pod addresses.", nil},
		{"denied_packets_total", "Packets denied on this node since the first scrape, by direction and the policies that select the pod.", []string{"direction", "policies"}},
		{"table_unreadable", "1 when the kernel's table could not be read.", nil},
		{"flow_messages_lost_total", "Messages of flows that the kernel could not deliver.", nil},
		{"flow_ring_drops_total", "Connections overwritten in the ring before the flow log or a follower had read them.", nil},
		{"flow_sampling", "New connections are listed one in this many.", nil},
	} {
		c.desc[d.name] = prometheus.NewDesc("nftcni_"+d.name, d.help, d.labels, nil)
	}
	return c
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.desc {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	gauge := func(name string, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(c.desc[name], prometheus.GaugeValue, v, labels...)
	}
	counter := func(name string, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(c.desc[name], prometheus.CounterValue, float64(v), labels...)
	}
	gauge("build_info", 1, c.o.version, runtime.Version())
	c.collectStatus(ctx, gauge)
	c.collectMeasures(ch, counter)
	c.collectTable(ctx, gauge, counter)
	_, flows, _ := c.o.flows.log.since(0, 1)
	counter("flow_messages_lost_total", flows.Lost)
	counter("flow_ring_drops_total", c.o.flows.log.drops())
	gauge("flow_sampling", float64(flows.SampledOneIn))
}

func (c *collector) collectStatus(ctx context.Context, gauge func(string, float64, ...string)) {
	s, err := c.o.loop.status(ctx)
	ready := 0.0
	if err == nil && s.Ready {
		ready = 1
	}
	gauge("ready", ready)
	if err != nil {
		return
	}
	gauge("attachments", float64(s.Attachments))
	gauge("attachments_waiting", float64(s.Waiting))
	for kind, n := range map[string]int{"Namespace": s.Namespaces, "Pod": s.Pods, "NetworkPolicy": s.Policies, "Node": s.Nodes} {
		gauge("objects", float64(n), kind)
	}
	problems := map[string]int{"warning": 0, "refused": 0}
	for _, p := range s.Problems {
		problems[p.Severity.String()]++
	}
	for severity, n := range problems {
		gauge("problems", float64(n), severity)
	}
	leased := 0
	_ = c.o.loop.do(ctx, func() { leased = len(c.o.loop.inv.holders) }) // 0 while the loop does not answer
	gauge("leases", float64(leased))
}

func (c *collector) collectMeasures(ch chan<- prometheus.Metric, counter func(string, uint64, ...string)) {
	m := c.o.loop.commits.measures
	m.mu.Lock()
	defer m.mu.Unlock()
	ch <- m.commit.clone().metric(c.desc["event_to_kernel_seconds"])
	ch <- m.kernel.clone().metric(c.desc["kernel_commit_seconds"])
	counter("transactions_total", m.transactions)
	counter("commit_failures_total", m.failures)
	for verb, h := range m.requests {
		ch <- h.clone().metric(c.desc["cni_request_seconds"], verb)
		counter("cni_request_errors_total", m.refused[verb], verb)
	}
}

// collectTable reads the kernel's table.
func (c *collector) collectTable(ctx context.Context, gauge func(string, float64, ...string), counter func(string, uint64, ...string)) {
	failed := 0.0
	if err := c.readTable(ctx, gauge); err != nil {
		failed = 1
	}
	gauge("table_unreadable", failed)
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, n := range c.total {
		counter("denied_packets_total", n, key[0], key[1])
	}
}

func (c *collector) readTable(ctx context.Context, gauge func(string, float64, ...string)) error {
	r, err := nft.NewReader(ctx, nft.Options{})
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	sizes, err := r.Sizes(ctx)
	if err != nil {
		return err
	}
	for set, n := range sizes {
		gauge("elements", float64(n), set)
	}
	epoch, err := r.Epoch(ctx)
	if err != nil {
		return err
	}
	gauge("epoch", float64(epoch))
	return c.readDenied(ctx, r)
}

// readDenied adds what the denied sets gained since the last scrape. Their elements
// expire, so the sets themselves are no counters.
func (c *collector) readDenied(ctx context.Context, r *nft.Reader) error {
	denials, err := r.Denials(ctx)
	if err != nil {
		return err
	}
	names, err := c.o.flows.names.current(ctx)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := make(map[deniedKey]uint64, len(denials))
	for _, d := range denials {
		key := deniedKey{d.Profile, d.Src.String(), d.Dst.String()}
		now[key] = d.Packets
		gained := d.Packets
		if old := c.denied[key]; old <= d.Packets {
			gained -= old
		}
		dir := d.Direction()
		c.total[[2]string{dir.String(), names.isolating(d, dir)}] += gained
	}
	c.denied = now
	return nil
}

// isolating names the policies that select the denied pod in a direction.
func (n *named) isolating(d nft.Denial, dir policy.Direction) string {
	v := n.oracle.Evaluate(policy.Flow{Src: d.Src, Dst: d.Dst})
	decision := v.Ingress
	if dir == policy.Egress {
		decision = v.Egress
	}
	if text := decider(decision); text != "" {
		return strings.TrimSuffix(text, ",")
	}
	return "unknown"
}
