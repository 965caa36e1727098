package k8s

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"time"

	"github.com/nftcni/nftcni/policy"
)

const (
	// goneGrace is how long the objects of a file that vanished stay in force: editors
	// and git replace a file by deleting and creating it.
	goneGrace = 100 * time.Millisecond
	// busyPatience is how long a file may be open for writing before that is a
	// Problem, and how long the first read waits for it.
	busyPatience = 2 * time.Second
	// busyInterval is the longest time between two looks at such a file. The kernel
	// reports IN_CLOSE_WRITE a moment before it would grant a lease, so the event alone
	// is not enough.
	busyInterval = 100 * time.Millisecond
	// blindInterval is how often directories that cannot be watched are looked at.
	blindInterval = 2 * time.Second
)

// Manifests is the Source that reads a directory of Kubernetes YAML and JSON and
// follows its changes: *.yaml, *.yml and *.json at any depth, several documents to a
// file, Lists; kinds Namespace, Node, Pod and NetworkPolicy. Names that start with a
// dot and links to directories are not read.
//
// A file counts when its writer has closed it. An object whose new version is refused
// keeps its last accepted one; a NetworkPolicy that never was valid isolates the pods
// it selects; the objects of a deleted file go 100 ms later. If an object is defined
// more than once, the first valid definition by path and document is in force. A
// namespace exists because it has a manifest or because a Pod or NetworkPolicy is in
// it. metadata.generation counts the versions of a NetworkPolicy from 1.
type Manifests struct {
	dir string
	log *slog.Logger
}

// ManifestOptions of NewManifests; the zero value is usable.
type ManifestOptions struct {
	Log *slog.Logger // nil: discard
}

// NewManifests returns the Source for dir, which must exist when Run is called.
func NewManifests(dir string, o ManifestOptions) *Manifests {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Manifests{dir: filepath.Clean(dir), log: o.Log}
}

// Run implements Source.
func (m *Manifests) Run(ctx context.Context, sink Sink) (err error) {
	root, err := filepath.EvalSymlinks(m.dir)
	if err != nil {
		return fmt.Errorf("manifest directory: %w", err)
	}
	w, err := newWatcher(root)
	if err != nil {
		return fmt.Errorf("manifest directory %s: %w", root, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		done <- w.interrupt()
	}()
	defer func() {
		cancel()
		err = errors.Join(err, <-done, w.close())
	}()
	return newFollower(root, w, m.log).run(ctx, sink)
}

// A follower keeps an inventory up to date with a directory.
type follower struct {
	root    string
	watcher *watcher
	log     *slog.Logger
	inv     *inventory
	seed    maphash.Seed
	digests map[string]uint64    // content last parsed, of every known file
	busy    map[string]time.Time // open for writing, since
	gone    map[string]time.Time // known and vanished, since
	failed  map[string]error     // could not be read
	lost    error                // the root itself could not be read
	told    []Problem            // last list the sink got
}

func newFollower(root string, w *watcher, log *slog.Logger) *follower {
	return &follower{
		root: root, watcher: w, log: log,
		inv:     newInventory(),
		seed:    maphash.MakeSeed(),
		digests: map[string]uint64{},
		busy:    map[string]time.Time{},
		gone:    map[string]time.Time{},
		failed:  map[string]error{},
	}
}

func (f *follower) run(ctx context.Context, sink Sink) error {
	if err := f.start(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	f.told = f.problems(time.Now())
	sink.Replace(f.inv.cluster(), f.told)
	for {
		c := changes{paths: map[string]bool{}}
		if err := f.watcher.wait(f.timeout(time.Now()), &c); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		events := f.follow(c, time.Now())
		problems := f.problems(time.Now())
		if len(events) > 0 || !slices.Equal(problems, f.told) {
			f.told = problems
			f.log.Debug("manifests changed", "events", len(events), "problems", len(problems))
			sink.Apply(events, problems)
		}
	}
}

// start reads everything once and waits, a little, for files that are being written.
func (f *follower) start(ctx context.Context) error {
	began := time.Now()
	f.follow(changes{paths: map[string]bool{}, rescan: true}, began)
	if f.lost != nil {
		return fmt.Errorf("manifest directory: %w", f.lost)
	}
	for len(f.busy) > 0 && ctx.Err() == nil {
		left := busyPatience - time.Since(began)
		if left <= 0 {
			return nil
		}
		c := changes{paths: map[string]bool{}}
		if err := f.watcher.wait(min(left, f.timeout(time.Now())), &c); err != nil {
			return err
		}
		f.follow(c, time.Now())
	}
	return nil
}

// timeout is how long nothing needs to be done unless something happens.
func (f *follower) timeout(now time.Time) time.Duration {
	next := time.Duration(-1)
	earlier := func(at time.Time) {
		if d := max(at.Sub(now), 0); next < 0 || d < next {
			next = d
		}
	}
	for _, since := range f.gone {
		earlier(since.Add(goneGrace))
	}
	for _, since := range f.busy {
		earlier(now.Add(min(max(now.Sub(since)/8, time.Millisecond), busyInterval)))
	}
	if f.watcher.blind != nil || f.lost != nil {
		earlier(now.Add(blindInterval))
	}
	return next
}

// follow reads what changed and brings the inventory up to date.
func (f *follower) follow(c changes, now time.Time) []policy.Event {
	if c.rescan || f.watcher.blind != nil || f.lost != nil {
		f.rescan(&c)
	}
	for path := range f.busy {
		c.paths[path] = true
	}
	updates := map[string]*parsedFile{}
	for path := range c.paths {
		if parsed := f.read(path, now); parsed != nil {
			updates[path] = parsed
		}
	}
	for path, since := range f.gone {
		if now.Sub(since) >= goneGrace {
			updates[path] = nil
			delete(f.gone, path)
			delete(f.digests, path)
		}
	}
	return f.inv.update(updates)
}

// rescan adds every file there is and every file that was known.
func (f *follower) rescan(c *changes) {
	files, err := f.watcher.scan()
	if f.lost = err; err != nil {
		// Files that vanished just now went with the directory.
		clear(c.paths)
		clear(f.gone)
		return
	}
	for path := range files {
		c.paths[path] = true
	}
	for path := range f.digests {
		c.paths[path] = true
	}
}

// read reads and parses one file, nil if it is as it was or cannot be read now.
func (f *follower) read(path string, now time.Time) *parsedFile {
	data, err := readFile(path)
	switch {
	case errors.Is(err, errBusy):
		delete(f.gone, path)
		if _, ok := f.busy[path]; !ok {
			f.busy[path] = now
		}
		return nil
	case errors.Is(err, fs.ErrNotExist):
		delete(f.busy, path)
		delete(f.failed, path)
		_, known := f.digests[path]
		if _, ok := f.gone[path]; known && !ok {
			f.gone[path] = now
		}
		return nil
	}
	delete(f.busy, path)
	delete(f.gone, path)
	if err != nil {
		f.failed[path] = err
		return nil
	}
	delete(f.failed, path)
	digest := maphash.Bytes(f.seed, data)
	if old, ok := f.digests[path]; ok && old == digest {
		return nil
	}
	f.digests[path] = digest
	parsed := parseFile(path, data)
	return &parsed
}

// problems is the inventory's list and what stands in the way of reading.
func (f *follower) problems(now time.Time) []Problem {
	out := f.inv.problems(f.gone)
	for path, err := range f.failed {
		out = append(out, Problem{Severity: Refused, File: path, Message: err.Error(),
			Effect: "objects that this file held before stay as they were", Remedy: "make it a readable regular file"})
	}
	for path, since := range f.busy {
		if now.Sub(since) >= busyPatience {
			out = append(out, Problem{Severity: Refused, File: path, Message: "open for writing, so it may be incomplete",
				Effect: "objects that this file held before stay as they were", Remedy: "close the file; better, write a new one and rename it"})
		}
	}
	if f.lost != nil {
		out = append(out, Problem{Severity: Refused, File: f.root, Message: f.lost.Error(),
			Effect: "all objects stay as they were", Remedy: "restore the directory"})
	}
	if f.watcher.blind != nil {
		out = append(out, Problem{File: f.root, Message: f.watcher.blind.Error(),
			Effect: "changes are found every " + blindInterval.String(), Remedy: "make all directories readable and raise sysctl fs.inotify.max_user_watches"})
	}
	return sortProblems(out)
}
