package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Options of Run.
type Options struct {
	Config Config
	Source k8s.Source
	Log    *slog.Logger
	// WaitForPods makes attachments wait, at most Config.PodWait, until the source lists
	// their pod: right with an API server, wrong with manifests, where a pod may have none.
	// It also keeps the source's objects in Config.StateDir for a start without it.
	WaitForPods bool
	// Listening is called when the table is adopted and the socket answers; the source may
	// be unknown for long after. Serving is called when its first complete state is in force.
	// Their errors are logged.
	Listening, Serving func() error
	// TableSocket is the socket that owns the table, kept by systemd for a predecessor;
	// KeepSocket hands it to systemd for a successor. Both may be nil.
	TableSocket *os.File
	KeepSocket  func(*os.File) error
	// Publish tells other nodes the addresses of attached pods; nil: nobody to tell.
	Publish PublishFunc
	// PublishKey makes this node's public keys known to the others; nil: nobody to tell.
	PublishKey func(ctx context.Context, key string) error
	// PublishMeshAddresses makes the addresses known that others send this node's pods' packets to, where the
	// configuration chooses others than the Node object has; nil: nobody to tell.
	PublishMeshAddresses func(ctx context.Context, addrs []netip.Addr) error
	// Generation reads a policy's generation for those who wait for it; nil: the source counts
	// none.
	Generation GenerationFunc
	// KeepSmall adapts the garbage collector (GOGC) of this process to the size of the cluster.
	KeepSmall bool
	// Version is what the metrics say this is.
	Version string
}

// Run serves until ctx ends and leaves the rules in force. An error is one that waiting
// cannot cure: a second agent, an unusable source, a kernel that refuses the table.
func Run(ctx context.Context, o Options) error {
	if err := os.MkdirAll(o.Config.RunDir, 0o700); err != nil {
		return fmt.Errorf("make the run directory: %w", err)
	}
	held, err := lock(o.Config.RunDir)
	if err != nil {
		return err
	}
	defer held.Close()
	alone, err := lockTable()
	if err != nil {
		return err
	}
	defer alone.Close()
	opts := nft.Options{Owner: *o.Config.OwnTable, Socket: o.TableSocket, Log: o.Log}
	table, err := nft.Open(ctx, opts)
	if err != nil {
		return fmt.Errorf("open table: %w", err)
	}
	opts.Socket = nil // it is in use
	routes, err := newMesh(o.Config, o.Log)
	if err != nil {
		return errors.Join(err, table.Close())
	}
	keepSocket(o, table)
	l := newLoop(o.Config, o.Log, table)
	l.waitForPods, l.mesh = o.WaitForPods, routes
	l.inv.unlabelled.mirrors = o.WaitForPods
	if routes != nil {
		routes.publisher.key, routes.publisher.addrs = o.PublishKey, o.PublishMeshAddresses
	}
	l.reopen = func(ctx context.Context) (dataplane, error) {
		t, err := nft.Open(ctx, opts)
		if err == nil {
			keepSocket(o, t)
		}
		return t, err
	}
	defer func() { _ = l.table.Close() }()
	if o.Publish != nil {
		l.publish = newPublisher(o.Publish, o.Log)
	}
	l.serving = func() { o.told("serving", o.Serving) }
	l.loadAttachments()
	return l.serveAll(ctx, o)
}

func keepSocket(o Options, table *nft.Table) {
	if o.KeepSocket == nil || !*o.Config.OwnTable {
		return
	}
	f, err := table.File()
	if err == nil {
		err = errors.Join(o.KeepSocket(f), f.Close())
	}
	if err != nil {
		o.Log.Warn("the socket that owns the table is not kept for a successor", "err", err)
	}
}

// told calls a callback of Options.
func (o Options) told(what string, f func() error) {
	if f == nil {
		return
	}
	if err := f(); err != nil {
		o.Log.Error("callback failed", "when", what, "err", err)
	}
}

// loadAttachments takes up what the plugin recorded before this process started.
func (l *loop) loadAttachments() {
	list, errs := cni.Attachments(l.cfg.RunDir)
	for _, err := range errs {
		l.log.Error("attachment record unreadable: its pod stays closed until it is attached again", "err", err)
	}
	for _, a := range list {
		if err := checkAttachment(a); err != nil {
			l.log.Error("attachment record refused", "err", err)
			continue
		}
		l.inv.attach(a)
	}
}

// serveAll runs the loop, the source, the socket and the watches until the first of
// them fails or ctx ends.
func (l *loop) serveAll(ctx context.Context, o Options) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ln, err := listen(o.Config.Socket())
	if err != nil {
		return err
	}
	srv := newServer(o.Config, o.Log, l)
	var tasks sync.WaitGroup
	start := func(name string, run func() error) {
		tasks.Go(func() {
			if err := run(); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	watches := newObservers(l, o.Log, o.Version)
	srv.mux.HandleFunc("GET "+PathFlows, watches.flows.flows)
	srv.mux.HandleFunc("GET "+PathEnforced, func(w http.ResponseWriter, r *http.Request) { l.serveEnforced(w, r, o.Generation) })
	start("loop", func() error { return l.run(ctx) })
	if err := watches.start(ctx, o.Config, start); err != nil {
		cancel(err)
	}
	start("socket", func() error { return serveHTTP(&srv.http, ln) })
	start("source", func() error {
		return o.Source.Run(ctx, sink{ctx, l, new([]k8s.Problem)})
	})
	start("watch", func() error { return l.watch(ctx) })
	if l.waitForPods {
		start("last known objects", func() error { return keepLastKnown(ctx, l, o.Log) })
	}
	if l.publish != nil {
		start("publish", func() error { return l.publish.run(ctx) })
	}
	if l.mesh != nil {
		start("mesh", func() error { return l.mesh.run(ctx) })
	}
	if o.KeepSmall {
		start("memory", func() error { return l.keepSmall(ctx) })
	}
	start("orphans", func() error { return l.reconcile(ctx) })
	o.told("listening", o.Listening)
	<-ctx.Done()
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer done()
	err = srv.http.Shutdown(stop)
	tasks.Wait()
	l.writeSnapshot(l.unwritten(), l.log)
	if l.waitForPods {
		l.save(l.unsaved(), l.log)
	}
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return errors.Join(cause, err)
	}
	l.log.Info("stopped; the rules stay in force")
	return nil
}

func serveHTTP(s *http.Server, ln net.Listener) error {
	if err := s.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// sink is the loop as k8s.Sink.
type sink struct {
	ctx   context.Context
	loop  *loop
	known *[]k8s.Problem // already logged
}

// Replace implements k8s.Sink.
func (s sink) Replace(c *policy.Cluster, problems []k8s.Problem) {
	s.logProblems(problems)
	_ = s.loop.send(s.ctx, s.loop.replace(c, problems))
}

// Apply implements k8s.Sink.
func (s sink) Apply(events []policy.Event, problems []k8s.Problem) {
	s.logProblems(problems)
	_ = s.loop.send(s.ctx, s.loop.apply(events, problems))
}
