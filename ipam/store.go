package ipam

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// FileName is the lease file in a state directory.
const FileName = "leases.db"

// CoolDown is how long a released address rests while others are free.
const CoolDown = 60 * time.Second

// keepReleased bounds the released addresses that are remembered: with more, those past
// their cool-down are forgotten. A /64 would otherwise grow the file for ever.
const keepReleased = 4096

// Options say where leases are kept and how the store learns about its surroundings.
type Options struct {
	Dir string           // state directory, made with mode 0700 when it is missing
	Now func() time.Time // nil: time.Now
	// Boot is the boot ID; empty: /proc/sys/kernel/random/boot_id.
	Boot string
	// Gone says that the network namespace at a path does not exist any more; nil: stat.
	Gone func(path string) bool
	// Live returns the leases that the running system proves, for a file that was lost.
	Live func(context.Context) ([]Lease, error)
	// Report is told in one sentence what was repaired; nil: nothing is said.
	Report func(string)
}

// Store keeps leases in Options.Dir. It holds no file open between calls, so any number
// of processes and goroutines may use the same directory.
type Store struct{ o Options }

// New returns a store. It touches nothing before its first method is called.
func New(o Options) (*Store, error) {
	if !filepath.IsAbs(o.Dir) {
		return nil, fmt.Errorf("stateDir: %q is not an absolute path", o.Dir)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Report == nil {
		o.Report = func(string) {}
	}
	if o.Gone == nil {
		o.Gone = func(path string) bool { _, err := os.Stat(path); return errors.Is(err, fs.ErrNotExist) }
	}
	if o.Boot == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, fmt.Errorf("read boot ID: %w", err)
		}
		o.Boot = strings.TrimSpace(string(id))
	}
	return &Store{o: o}, nil
}

// Exists says whether there is a lease file: without one nothing can be leased.
func (s *Store) Exists() bool {
	_, err := os.Stat(s.path())
	return err == nil
}

func (s *Store) path() string { return filepath.Join(s.o.Dir, FileName) }

// update runs fn in one transaction, with the file to ourselves.
func (s *Store) update(ctx context.Context, fn func(*tables) error) error {
	lock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	err = s.renew(lock)
	if err == nil {
		err = s.attempt(fn)
	}
	var bad *corruptError
	if !errors.As(err, &bad) {
		return err
	}
	if err := s.setAside(ctx, bad); err != nil {
		return err
	}
	if err := s.renew(lock); err != nil {
		return err
	}
	return s.attempt(fn)
}

// lock takes leases.lock. bbolt locks its file as well, but polls every 50 ms where
// flock(2) queues: with 20 plugins at a time that polling would be most of an ADD.
func (s *Store) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(s.o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	path := filepath.Join(s.o.Dir, "leases.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lease lock: %w", err)
	}
	fd := int(f.Fd())
	if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil {
		return f, nil
	}
	done := make(chan error, 1)
	go func() { done <- flock(fd) }()
	select {
	case err := <-done:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		return f, nil
	case <-ctx.Done():
		// The waiter cannot be called off; whenever it gets the lock it gives it back.
		go func() { <-done; _ = f.Close() }()
		return nil, fmt.Errorf("lock %s: %w", path, ctx.Err())
	}
}

func flock(fd int) error {
	for {
		if err := unix.Flock(fd, unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// corruptError says that the file's content, not the access to it, is the problem.
type corruptError struct{ cause error }

func (e *corruptError) Error() string { return fmt.Sprintf("lease file is corrupt: %v", e.cause) }
func (e *corruptError) Unwrap() error { return e.cause }

// attempt opens the file, runs fn in a transaction and closes the file. bbolt answers
// damage behind the first pages with panics and faults of its mapping.
func (s *Store) attempt(fn func(*tables) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverCorrupt(&err)
	db, err := s.open()
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		t, err := makeTables(tx)
		if err != nil {
			return err
		}
		return fn(t)
	})
	return errors.Join(err, db.Close())
}

func recoverCorrupt(err *error) {
	if p := recover(); p != nil {
		*err = &corruptError{cause: fmt.Errorf("%v", p)}
	}
}

func (s *Store) open() (*bolt.DB, error) {
	db, err := bolt.Open(s.path(), 0o600, s.boltOptions(false))
	return db, s.openError(err)
}

// boltOptions keep the freelist in the file: without it bbolt walks all pages on open, in
// a goroutine of its own, where a damaged page ends the process.
func (s *Store) boltOptions(readOnly bool) *bolt.Options {
	return &bolt.Options{Timeout: 5 * time.Second, ReadOnly: readOnly, NoSync: true, NoGrowSync: true,
		NoStatistics: true, InitialMmapSize: 1 << 20}
}

// openError tells damage from what the administrator can repair.
func (s *Store) openError(err error) error {
	var path *fs.PathError
	var errno unix.Errno
	switch {
	case err == nil:
		return nil
	case errors.As(err, &path), errors.As(err, &errno), errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("open lease file %s: %w", s.path(), err)
	default:
		return &corruptError{cause: err}
	}
}

// setAside renames the bad file and starts a new one with what the caller finds alive.
func (s *Store) setAside(ctx context.Context, bad *corruptError) error {
	aside := fmt.Sprintf("%s.corrupt-%d", s.path(), s.o.Now().UnixNano())
	if err := os.Rename(s.path(), aside); err != nil {
		return fmt.Errorf("set corrupt lease file aside: %w", errors.Join(err, bad))
	}
	var live []Lease
	if s.o.Live != nil {
		var err error
		if live, err = s.o.Live(ctx); err != nil {
			// Without the list an address could be leased twice: leave no empty file behind.
			return errors.Join(fmt.Errorf("rebuild leases after %w: %w", bad, err), os.Rename(aside, s.path()))
		}
	}
	s.o.Report(fmt.Sprintf("%v: set aside as %s, rebuilt with %d live addresses", bad, aside, len(live)))
	return s.attempt(func(t *tables) error {
		for _, l := range live {
			if l.Boot == "" {
				l.Boot = s.o.Boot
			}
			if err := t.put(l); err != nil {
				return err
			}
		}
		return nil
	})
}
