package agent

import (
	"context"
	"math"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// garbageWanted is how much garbage, in bytes, the agent makes between two collections of
	// a large heap: a few hundred changes. A fixed share of the heap, as the runtime's default
	// is, would make a large cluster's agent larger by that share for nothing.
	garbageWanted = 3 << 20
	// Percent of the live heap that garbage may add, at least and at most.
	minGarbage, maxGarbage = 6, 50
	// spareWanted is how much memory, in bytes, may lie empty without being given back.
	spareWanted = 3 << 20
	// memoryInterval is how often the share is adapted to the heap, and
	// empty memory looked for. Giving it back costs a collection.
	memoryInterval = 2 * time.Second
)

// garbageShare is the percentage (GOGC) for a live heap of so many bytes.
func garbageShare(live uint64) int {
	return int(min(max(garbageWanted*100/max(live, 1), minGarbage), maxGarbage))
}

// keepSmall adapts the garbage collector to the size of the cluster until ctx ends, and
// gives back what the first complete state and the files of all objects leave behind.
func (l *loop) keepSmall(ctx context.Context) error {
	select {
	case <-l.sourceLive:
	case <-ctx.Done():
		return nil
	}
	if l.do(ctx, func() {}) != nil { // it is in force now
		return nil
	}
	sizes := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	spare := uint64(math.MaxUint64)
	tick := time.NewTicker(memoryInterval)
	defer tick.Stop()
	for {
		if spare > spareWanted {
			debug.FreeOSMemory()
		}
		metrics.Read(sizes)
		debug.SetGCPercent(garbageShare(sizes[0].Value.Uint64()))
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		metrics.Read(sizes)
		spare = sizes[1].Value.Uint64()
	}
}
