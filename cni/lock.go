package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a plugin that waits for another one of the same attachment looks
// again. Only calls for one container and interface ever wait for each other.
const lockPoll = 5 * time.Millisecond

// errBusy says that another process works on the attachment.
var errBusy = errors.New("another nftcni process works on this attachment")

// attachmentLock keeps an attachment to one process: a plugin while it adds or deletes,
// or the agent while it cleans up. The kernel drops it when the process dies, so a record
// that is unfinished and not locked belongs to nobody any more: that is how the agent
// tells a killed plugin from a slow one. It is one byte of one file, at the number that
// the interface's name holds, so no lock files pile up (open file description locks,
// fcntl(2)).
type attachmentLock struct{ file *os.File }

func openLock(runDir string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Join(runDir, attachmentDir), 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(runDir, "attachments.lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open attachment lock: %w", err)
	}
	return f, nil
}

// lockAttachment waits until ctx ends for the lock of hostInterface.
func lockAttachment(ctx context.Context, runDir, hostInterface string) (*attachmentLock, error) {
	for {
		l, err := tryLockAttachment(runDir, hostInterface)
		if !errors.Is(err, errBusy) {
			return l, err
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return nil, tryLater("%v: %s", err, hostInterface)
		}
	}
}

// tryLockAttachment returns errBusy when somebody else has the lock.
func tryLockAttachment(runDir, hostInterface string) (*attachmentLock, error) {
	n, err := lockOffset(hostInterface)
	if err != nil {
		return nil, err
	}
	f, err := openLock(runDir)
	if err != nil {
		return nil, err
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: n, Len: 1})
	switch {
	case err == nil:
		return &attachmentLock{f}, nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return nil, errors.Join(errBusy, f.Close())
	default:
		return nil, errors.Join(fmt.Errorf("lock attachment %s: %w", hostInterface, err), f.Close())
	}
}

func (l *attachmentLock) unlock() { _ = l.file.Close() }

func lockOffset(hostInterface string) (int64, error) {
	if !isHostInterface(hostInterface) {
		return 0, fmt.Errorf("lock attachment: %q is not the name of a pod's interface", hostInterface)
	}
	n, err := strconv.ParseInt(hostInterface[len(hostPrefix):], 16, 64)
	if err != nil {
		return 0, fmt.Errorf("lock attachment %s: %w", hostInterface, err)
	}
	return n, nil
}
