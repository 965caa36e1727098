package nft

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/policy"
)

// epochAgain is the comment of an epoch after the first of the two bumps that a revocation takes. It outlives the
// agent: whoever adopts the table makes the second.
const epochAgain = "bump again"

// epochClear are the bits of an epoch that stay clear: kube-proxy's marks.
const epochClear = 0x4000 | 0x8000

// nextEpoch follows e, wrapping at the end of 32 bits.
func nextEpoch(e uint32) uint32 {
	e++
	if e&epochClear != 0 {
		e = e&^uint32(0xffff) + 0x1_0000
	}
	return max(e, policy.EpochFirst)
}

// firstEpoch is random: connections stamped by a table that was deleted must not come back to life.
func firstEpoch() (uint32, error) {
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("first epoch: %w", err)
	}
	return (binary.NativeEndian.Uint32(b[:])|policy.EpochFirst)&^uint32(epochClear) | 1<<31, nil
}

// bump makes a new epoch live. again says that a second bump must follow.
func (t *Table) bump(b *batch, again bool) uint32 {
	next := nextEpoch(t.epoch)
	b.removeEpoch(t.epoch)
	b.addEpoch(next, again)
	return next
}

// replaceEpoch mends a table whose epoch somebody removed or doubled: nothing stays live.
func (t *Table) replaceEpoch() error {
	e, err := firstEpoch()
	if err != nil {
		return err
	}
	b := newBatch(t.conn.seq)
	for _, set := range []string{"epoch", "stamp"} {
		b.flushSet(set)
	}
	b.addEpoch(e, false)
	if err := t.conn.commit(b); err != nil {
		return fmt.Errorf("mend epoch: %w", err)
	}
	t.epoch, t.again = e, false
	return nil
}

func (b *batch) flushSet(set string) {
	b.change(unix.NFT_MSG_DELSETELEM, 0, "flush set "+set)
	b.str(unix.NFTA_SET_ELEM_LIST_TABLE, TableName)
	b.str(unix.NFTA_SET_ELEM_LIST_SET, set)
	b.endMessage()
}

// graceDelay is what Grace waits where the kernel cannot say when the packets in flight are through. A packet
// runs through our hooks in one go, in microseconds; a second leaves room for a virtual CPU that was not scheduled.
const graceDelay = time.Second

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL of linux/membarrier.h.
const membarrierGlobal = 1

// Grace returns when every packet now in flight has left the rules: membarrier(MEMBARRIER_CMD_GLOBAL), which is
// synchronize_rcu, or a generous delay where the kernel refuses it (nohz_full). It may be called from any goroutine.
func Grace(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	if errno == 0 {
		return nil
	}
	timer := time.NewTimer(graceDelay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for packets in flight: %w", errors.Join(errno, ctx.Err()))
	}
}

// replacesExactly reports whether a lookup never misses a key that one transaction deletes and adds again: Linux
// 6.17 restarts a lookup that raced with a commit. Older kernels with that fix backported only cost a wait more.
func replacesExactly() bool { return kernelFrom(6, 17) }

// kernelFrom reports whether the running kernel is of that version or newer.
func kernelFrom(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var haveMajor, haveMinor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &haveMajor, &haveMinor); err != nil {
		return false
	}
	return haveMajor > major || haveMajor == major && haveMinor >= minor
}
