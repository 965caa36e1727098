package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Histogram counts durations by upper bound, as Prometheus does: Counts[i] holds those of at
// most BoundsMicros[i] and more than the bound before; the last count has no bound.
type Histogram struct {
	BoundsMicros []int64  `json:"boundsMicros"`
	Counts       []uint64 `json:"counts"`
	SumMicros    int64    `json:"sumMicros"`
}

func newHistogram() Histogram {
	bounds := []int64{50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 1000000, 10000000}
	return Histogram{BoundsMicros: bounds, Counts: make([]uint64, len(bounds)+1)}
}

func (h *Histogram) observe(micros int64) {
	i := 0
	for i < len(h.BoundsMicros) && micros > h.BoundsMicros[i] {
		i++
	}
	h.Counts[i]++
	h.SumMicros += micros
}

func (h Histogram) clone() Histogram {
	h.Counts = append([]uint64(nil), h.Counts...)
	return h
}

// metric makes a Prometheus histogram in seconds.
func (h Histogram) metric(d *prometheus.Desc, labels ...string) prometheus.Metric {
	buckets, total := map[float64]uint64{}, uint64(0)
	for i, n := range h.Counts {
		total += n
		if i < len(h.BoundsMicros) {
			buckets[float64(h.BoundsMicros[i])/1e6] = total
		}
	}
	return prometheus.MustNewConstHistogram(d, total, float64(h.SumMicros)/1e6, buckets, labels...)
}

// measures is what the agent counts from its start. The loop and the socket's server
// write it.
type measures struct {
	mu           sync.Mutex
	commit       Histogram // from event to the kernel's acknowledgement
	kernel       Histogram // of that, the transactions
	requests     map[string]*Histogram
	refused      map[string]uint64 // requests by verb
	transactions uint64
	failures     uint64
}

func newMeasures() *measures {
	add, del := newHistogram(), newHistogram()
	return &measures{commit: newHistogram(), kernel: newHistogram(), requests: map[string]*Histogram{"add": &add, "del": &del},
		refused: map[string]uint64{}}
}

func (m *measures) committed(c Commit) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.commit.observe(c.Micros)
	m.kernel.observe(c.KernelMicros)
	m.transactions += uint64(c.Transactions)
	if c.Error != "" {
		m.failures++
	}
}

// request counts one answer to the plugin: verb is add or del.
func (m *measures) request(verb string, took time.Duration, failed bool) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[verb].observe(took.Microseconds())
	if failed {
		m.refused[verb]++
	}
}

// latency is the two histograms for debug status.
func (m *measures) latency() (commit, kernel Histogram) {
	if m == nil {
		return commit, kernel
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.commit.clone(), m.kernel.clone()
}

// observers are the parts of the agent that only watch.
type observers struct {
	loop    *loop
	log     *slog.Logger
	flows   *flowWatch
	version string
}

// newObservers must come before the loop runs.
func newObservers(l *loop, log *slog.Logger, version string) *observers {
	l.commits.measures = newMeasures()
	return &observers{loop: l, log: log, flows: newFlowWatch(l, log), version: version}
}

// start runs the watches; one that fails says so and leaves the agent alone.
func (o *observers) start(ctx context.Context, cfg Config, run func(name string, task func() error)) error {
	watch := func(name string, task func() error) {
		run(name, func() error {
			if err := task(); err != nil && ctx.Err() == nil {
				o.log.Warn(name+" is not available", "err", err)
			}
			return nil
		})
	}
	watch("the snapshot file", func() error { return keepSnapshotFile(ctx, o.loop, o.log) })
	var listening sync.WaitGroup // before the agent is ready: what happens then is listed
	listen := func(name string, follow func(context.Context, func()) error) {
		listening.Add(1)
		begun := sync.OnceFunc(listening.Done)
		watch(name, func() error {
			defer begun()
			return follow(ctx, begun)
		})
	}
	listen("the list of denied flows", o.flows.denials)
	listen("the list of allowed flows", o.flows.connections)
	listening.Wait()
	if cfg.FlowLog != "" {
		f, err := openFlowFile(cfg.FlowLog, flowFileBytes)
		if err != nil {
			return fmt.Errorf("config field flowLog: %w", err)
		}
		watch("the flow log", func() error { return o.flows.keepFlowFile(ctx, f) })
	}
	if cfg.Metrics == "" {
		return nil
	}
	return o.serveMetrics(ctx, cfg.Metrics, watch)
}

func (o *observers) serveMetrics(ctx context.Context, address string, watch func(name string, task func() error)) error {
	lc := net.ListenConfig{}
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("config field metrics: %w", err)
	}
	srv := &http.Server{Handler: o.handler(), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	watch("the metrics address", func() error {
		if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	o.log.Info("metrics", "address", ln.Addr().String())
	return nil
}

// handler serves /metrics, /healthz (the loop answers) and /readyz (policy is in force).
func (o *observers) handler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(newCollector(o), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { o.probe(w, r, false) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) { o.probe(w, r, true) })
	return mux
}

func (o *observers) probe(w http.ResponseWriter, r *http.Request, ready bool) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
	defer cancel()
	ok, reason := true, ""
	err := o.loop.do(ctx, func() {
		if ready {
			ok, reason = o.loop.ready()
		}
	})
	if err != nil {
		ok, reason = false, "the agent's loop does not answer"
	}
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"ok": ok, "reason": reason}) // the client is gone if this fails
}
