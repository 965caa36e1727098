package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

// writeSnapshotFile replaces the file as a whole: a reader never sees half of it.
func writeSnapshotFile(runDir string, s Snapshot) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("encode snapshot: %w", err)
	}
	name := filepath.Join(runDir, SnapshotName)
	if err := os.WriteFile(name+".part", b, 0o600); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := os.Rename(name+".part", name); err != nil {
		return errors.Join(fmt.Errorf("write snapshot: %w", err), os.Remove(name+".part"))
	}
	return nil
}

// keepSnapshotFile writes the file when commits have changed something, at most once an
// interval, until ctx ends.
func keepSnapshotFile(ctx context.Context, l *loop, log *slog.Logger) error {
	for {
		began := time.Now()
		var s Snapshot
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

// unwritten is what the file should hold, without a cluster if it does.
func (l *loop) unwritten() Snapshot {
	if l.commits.total == l.commits.written {
		return Snapshot{}
	}
	l.commits.written = l.commits.total
	return l.wholeSnapshot()
}

func (l *loop) writeSnapshot(s Snapshot, log *slog.Logger) {
	if s.Cluster == nil {
		return
	}
	s.Status.EventToKernel, s.Status.Kernel = l.commits.measures.latency()
	if err := writeSnapshotFile(l.cfg.RunDir, s); err != nil {
		log.Error("keep the snapshot file: debug commands have less to go by without the agent", "err", err)
	}
}
