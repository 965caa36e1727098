package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"
)

// SnapshotName is the file in the run directory that holds the last Snapshot, as JSON of
// mode 0600: what debug commands work from when the agent is dead.
const SnapshotName = "snapshot.json"

// snapshotInterval is the least time between two writes of the file: a storm of events
// costs one write, and a large cluster makes the time longer (pause).
const snapshotInterval = 2 * time.Second

// snapshotPatience is the greatest: on a busy machine a write seems to cost more than it does.
const snapshotPatience = 20 * time.Second

// ReadSnapshotFile reads what the last agent of runDir left.
func ReadSnapshotFile(runDir string) (Snapshot, error) {
	var s Snapshot
	b, err := os.ReadFile(filepath.Join(runDir, SnapshotName))
	if err != nil {
		return s, fmt.Errorf("read snapshot: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("snapshot %s: %w", filepath.Join(runDir, SnapshotName), err)
	}
	if s.Cluster == nil {
		return s, fmt.Errorf("snapshot %s holds no cluster", filepath.Join(runDir, SnapshotName))
	}
	return s, nil
}

// snapshotFile is a Snapshot before it is written, without copies of the objects.
type snapshotFile struct {
	at       time.Time
	objects  objects
	status   *Status
	enforced []Enforced
}

// writeSnapshotFile replaces the file as a whole: a reader never sees half of it.
func writeSnapshotFile(runDir string, s snapshotFile) error {
	name := filepath.Join(runDir, SnapshotName)
	f, err := os.OpenFile(name+".part", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	w := bufio.NewWriterSize(f, 64<<10)
	err = errors.Join(s.write(w), w.Flush(), f.Close())
	if err == nil {
		err = os.Rename(name+".part", name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write snapshot: %w", err), os.Remove(name+".part"))
	}
	return nil
}

// write writes s as JSON, an object a line. The encoder would keep the whole of a value in
// memory until it is complete: at 50,000 pods several times what the agent needs otherwise.
func (s snapshotFile) write(w io.Writer) error {
	j := jsonWriter{w: w, enc: json.NewEncoder(w)}
	j.text(`{"cluster":{"Namespaces":`)
	writeList(&j, s.objects.namespaces)
	j.text(`,"Pods":`)
	writeList(&j, s.objects.pods)
	j.text(`,"Nodes":`)
	writeList(&j, s.objects.nodes)
	j.text(`,"Policies":`)
	writeList(&j, s.objects.policies)
	j.text(`},"enforced":`)
	writeList(&j, s.enforced)
	j.text(`,"status":`)
	j.value(s.status)
	j.text(`,"at":`)
	j.value(s.at)
	j.text(`,"node":`)
	j.value(s.status.Node)
	j.text("}\n")
	return j.err
}

// jsonWriter remembers its first error.
type jsonWriter struct {
	w   io.Writer
	enc *json.Encoder
	err error
}

func (j *jsonWriter) text(s string) {
	if j.err == nil {
		_, j.err = io.WriteString(j.w, s)
	}
}

func (j *jsonWriter) value(v any) {
	if j.err == nil {
		j.err = j.enc.Encode(v)
	}
}

func writeList[T any](j *jsonWriter, list []T) {
	j.text("[")
	for i := range list {
		if i > 0 {
			j.text(",")
		}
		j.value(list[i])
	}
	j.text("]")
}

// keepSnapshotFile writes the file when commits have changed something, at most once an
// interval, until ctx ends.
func keepSnapshotFile(ctx context.Context, l *loop, log *slog.Logger) error {
	for {
		began := time.Now()
		var s snapshotFile
		if l.do(ctx, func() { s = l.unwritten() }) == nil {
			l.writeSnapshot(s, log)
		}
		wait := time.NewTimer(min(pause(snapshotInterval, time.Since(began)), snapshotPatience))
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
	}
}

// unwritten is what the file should hold, the zero value if it does.
func (l *loop) unwritten() snapshotFile {
	if l.commits.total == l.commits.written {
		return snapshotFile{}
	}
	l.commits.written = l.commits.total
	return l.wholeSnapshot()
}

func (l *loop) writeSnapshot(s snapshotFile, log *slog.Logger) {
	if s.status == nil {
		return
	}
	s.status.EventToKernel, s.status.Kernel = l.commits.measures.latency()
	if err := writeSnapshotFile(l.cfg.RunDir, s); err != nil {
		log.Error("keep the snapshot file: debug commands have less to go by without the agent", "err", err)
	}
}
