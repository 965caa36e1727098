package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// lastKnownName is the file in the state directory that holds the source's objects as
// they were when they were last written. It survives a reboot: with an API server that
// is down at boot, the pods that this node has already are enforced by it.
//
// It is JSON lines: lastKnownHeader, a lastKnownObject for each object, lastKnownEnd.
const lastKnownName = "objects.json"

const (
	lastKnownVersion = 1
	maxLastKnown     = 1 << 30 // bytes; 10,000 pods take 3 MB
	// sourcePatience is how long the source has for its first complete state before the
	// last known one is used.
	sourcePatience = 2 * time.Second
	// lastKnownInterval is the least time between two writes of the file.
	lastKnownInterval = 5 * time.Second
)

type lastKnownHeader struct {
	Version int       `json:"version"`
	Node    string    `json:"node"`
	At      time.Time `json:"at"`
}

// lastKnownObject has exactly one of its fields.
type lastKnownObject struct {
	Namespace *policy.Namespace `json:"namespace,omitempty"`
	Node      *policy.Node      `json:"node,omitempty"`
	Policy    *policy.Policy    `json:"policy,omitempty"`
	Pod       *policy.Pod       `json:"pod,omitempty"`
}

// lastKnownEnd tells a complete file from a torn or rotten one.
type lastKnownEnd struct {
	Objects int    `json:"objects"`
	CRC32C  uint32 `json:"crc32c"` // of the bytes before this line
}

// lastKnown is the content of the file.
type lastKnown struct {
	node    string
	at      time.Time
	objects []lastKnownObject
}

func (k *lastKnown) write(w io.Writer) error {
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	buffered := bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10)
	enc := json.NewEncoder(buffered)
	err := enc.Encode(lastKnownHeader{lastKnownVersion, k.node, k.at})
	for i := 0; i < len(k.objects) && err == nil; i++ {
		err = enc.Encode(k.objects[i])
	}
	if err = errors.Join(err, buffered.Flush()); err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(lastKnownEnd{len(k.objects), sum.Sum32()})
}

// save replaces the file as a whole; it is on the disk when save returns.
func (k *lastKnown) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("save the last known objects: %w", err)
	}
	f, err := os.CreateTemp(dir, lastKnownName+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("save the last known objects: %w", err)
	}
	err = errors.Join(k.write(f), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, lastKnownName))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("save the last known objects: %w", err), os.Remove(f.Name()))
	}
	return nil
}

// loadLastKnown reads the file of dir; nil if there is none. A file that cannot be
// understood is renamed to *.corrupt, and the error says so.
func loadLastKnown(dir string) (*lastKnown, error) {
	name := filepath.Join(dir, lastKnownName)
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the last known objects: %w", err)
	}
	defer f.Close()
	k, err := readLastKnown(io.LimitReader(f, maxLastKnown))
	if err != nil {
		err = fmt.Errorf("last known objects in %s are damaged (set aside as %s.corrupt): %w", name, name, err)
		return nil, errors.Join(err, os.Rename(name, name+".corrupt"))
	}
	return k, nil
}

func readLastKnown(from io.Reader) (*lastKnown, error) {
	r, sum, k := bufio.NewReaderSize(from, 64<<10), crc32.New(crc32.MakeTable(crc32.Castagnoli)), &lastKnown{}
	next := func(into any) ([]byte, error) {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return nil, fmt.Errorf("line %d is cut off: %w", len(k.objects)+1, err)
		}
		d := json.NewDecoder(bytes.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(into); err != nil {
			return nil, fmt.Errorf("line %d: %w", len(k.objects)+1, err)
		}
		return line, nil
	}
	var h lastKnownHeader
	line, err := next(&h)
	if err != nil {
		return nil, err
	}
	if h.Version != lastKnownVersion {
		return nil, fmt.Errorf("version %d: this program reads %d", h.Version, lastKnownVersion)
	}
	k.node, k.at = h.Node, h.At
	for {
		_, _ = sum.Write(line) // never fails
		var o struct {
			lastKnownObject
			lastKnownEnd
		}
		if line, err = next(&o); err != nil {
			return nil, err
		}
		if o.lastKnownObject != (lastKnownObject{}) {
			k.objects = append(k.objects, o.lastKnownObject)
			continue
		}
		if o.lastKnownEnd != (lastKnownEnd{len(k.objects), sum.Sum32()}) {
			return nil, errors.New("the checksum at the end is wrong")
		}
		if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
			return nil, errors.New("content after the end")
		}
		return k, nil
	}
}

func (k *lastKnown) cluster() *policy.Cluster {
	c := &policy.Cluster{}
	for _, o := range k.objects {
		switch {
		case o.Namespace != nil:
			c.Namespaces = append(c.Namespaces, *o.Namespace)
		case o.Node != nil:
			c.Nodes = append(c.Nodes, *o.Node)
		case o.Policy != nil:
			c.Policies = append(c.Policies, *o.Policy)
		case o.Pod != nil:
			c.Pods = append(c.Pods, *o.Pod)
		}
	}
	return c
}

// lastKnown lists the source's objects without copying them.
func (v *inventory) lastKnown(at time.Time) *lastKnown {
	k := &lastKnown{node: v.node, at: at,
		objects: make([]lastKnownObject, 0, len(v.namespaces)+len(v.nodes)+len(v.policies)+len(v.pods))}
	for _, o := range v.namespaces {
		k.objects = append(k.objects, lastKnownObject{Namespace: o})
	}
	for _, o := range v.nodes {
		k.objects = append(k.objects, lastKnownObject{Node: o})
	}
	for _, o := range v.policies {
		k.objects = append(k.objects, lastKnownObject{Policy: o})
	}
	for _, o := range v.pods {
		k.objects = append(k.objects, lastKnownObject{Pod: o})
	}
	return k
}

// keepLastKnown writes the file when the source's objects have changed, until ctx ends.
// While the source is unknown it restores what is in the file instead.
func keepLastKnown(ctx context.Context, l *loop, log *slog.Logger) error {
	patience := time.NewTimer(sourcePatience)
	defer patience.Stop()
	select {
	case <-l.sourceLive:
	case <-patience.C:
		l.restoreFile(ctx, log)
	case <-ctx.Done():
		return nil
	}
	select {
	case <-l.sourceLive:
	case <-ctx.Done():
		return nil
	}
	for {
		began := time.Now()
		var k *lastKnown
		if l.do(ctx, func() { k = l.unsaved() }) == nil {
			l.save(k, log)
		}
		wait := time.NewTimer(pause(lastKnownInterval, time.Since(began)))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
	}
}

// pause is the time between two writes of a file of which the last one took so long: it
// keeps them below half a percent of a core.
func pause(least, took time.Duration) time.Duration { return max(least, 200*took) }

// unsaved is what the file should hold, nil if it does.
func (l *loop) unsaved() *lastKnown {
	if !l.live || l.sourceVersion == l.savedVersion {
		return nil
	}
	l.savedVersion = l.sourceVersion
	return l.inv.lastKnown(time.Now())
}

func (l *loop) save(k *lastKnown, log *slog.Logger) {
	if k == nil {
		return
	}
	if err := k.save(l.cfg.StateDir); err != nil {
		log.Error("after a reboot without the source older objects would be in force", "err", err)
	}
}

// restoreFile hands the last known objects to the loop.
func (l *loop) restoreFile(ctx context.Context, log *slog.Logger) {
	k, err := loadLastKnown(l.cfg.StateDir)
	switch {
	case err != nil:
		log.Error("the source does not answer, and its last known objects are lost: pods wait for it", "err", err)
	case k == nil:
		log.Warn("the source does not answer, and no objects are known from before: pods wait for it")
	case k.node != l.cfg.Node:
		log.Warn("the last known objects are not used: they are of another node", "node", k.node, "want", l.cfg.Node)
	default:
		_ = l.send(ctx, func(b *batch) { l.restore(ctx, b, k) })
		return
	}
	if err != nil {
		_ = l.send(ctx, func(*batch) { l.note(lostProblem(err)) })
	}
}
