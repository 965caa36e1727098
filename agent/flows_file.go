package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"
)

// Bounds of the flow log file: FILE, FILE.1 and FILE.2 together take three times this.
const (
	flowFileBytes = 64 << 20
	flowFilesKept = 2
)

// flowFile writes Flows as JSON lines and rotates them.
type flowFile struct {
	path  string
	limit int64
	file  *os.File
	buf   *bufio.Writer
	size  int64
}

func openFlowFile(path string, limit int64) (*flowFile, error) {
	f := &flowFile{path: path, limit: limit}
	return f, f.open()
}

func (f *flowFile) open() error {
	file, err := os.OpenFile(f.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open flow log: %w", err)
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("open flow log: %w", err), file.Close())
	}
	f.file, f.size, f.buf = file, info.Size(), bufio.NewWriterSize(file, 1<<16)
	return nil
}

func (f *flowFile) write(flows []Flow) error {
	for _, flow := range flows {
		line, err := json.Marshal(flow)
		if err != nil {
			return fmt.Errorf("encode flow: %w", err)
		}
		n, err := f.buf.Write(append(line, '\n'))
		if err != nil {
			return fmt.Errorf("write flow log: %w", err)
		}
		f.size += int64(n)
	}
	if err := f.buf.Flush(); err != nil {
		return fmt.Errorf("write flow log: %w", err)
	}
	if f.size >= f.limit {
		return f.rotate()
	}
	return nil
}

// rotate renames FILE to FILE.1, that to FILE.2, and begins a new one.
func (f *flowFile) rotate() error {
	if err := f.file.Close(); err != nil {
		return fmt.Errorf("close flow log: %w", err)
	}
	name := func(i int) string {
		if i == 0 {
			return f.path
		}
		return f.path + "." + strconv.Itoa(i)
	}
	for i := flowFilesKept; i > 0; i-- {
		if err := os.Rename(name(i-1), name(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate flow log: %w", err)
		}
	}
	return f.open()
}

func (f *flowFile) close() error { return errors.Join(f.buf.Flush(), f.file.Close()) }

// keepFlowFile writes every connection of the ring to the file until ctx ends, in
// batches a second apart.
func (w *flowWatch) keepFlowFile(ctx context.Context, f *flowFile) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var after uint64
	var names *named
	for ended := false; !ended; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			ended = true
		}
		raw, out, _ := w.log.since(after, flowRing)
		after = out.Next
		if current, err := w.names.current(ctx); err == nil {
			names = current
		}
		if names == nil {
			continue // the agent ended before it knew anybody
		}
		var flows []Flow
		for i, r := range raw {
			if names.concerns(w.node, r) {
				flows = append(flows, names.describe(r, out.Next-uint64(len(raw)-1-i)))
			}
		}
		if err := f.write(flows); err != nil {
			w.slog.Error("flow log: flows of the last second are not written", "err", err)
		}
	}
	return f.close()
}
