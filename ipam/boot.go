package ipam

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"

	bolt "go.etcd.io/bbolt"
)

// renew makes the lease file trustworthy once per boot. The lock file names the boot that
// did it last; whatever a power cut left in it, it is not the ID of the boot after.
//
// The old file is read through and copied, never written to: what a power cut did to
// pages that are free, or to the list of them, does not matter then.
func (s *Store) renew(lock *os.File) error {
	known, err := io.ReadAll(io.NewSectionReader(lock, 0, 64))
	if err != nil {
		return fmt.Errorf("read %s: %w", lock.Name(), err)
	}
	if string(known) == s.o.Boot {
		return nil
	}
	if err := s.copyFile(); err != nil {
		return err
	}
	if err := lock.Truncate(0); err != nil {
		return fmt.Errorf("write %s: %w", lock.Name(), err)
	}
	if _, err := lock.WriteAt([]byte(s.o.Boot), 0); err != nil {
		return fmt.Errorf("write %s: %w", lock.Name(), err)
	}
	return nil
}

func (s *Store) copyFile() (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverCorrupt(&err)
	st, err := os.Stat(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && st.Size() == 0 {
		err = os.Remove(s.path())
		return err
	}
	if err != nil {
		return fmt.Errorf("look at lease file: %w", err)
	}
	whole, err := os.ReadFile(s.path())
	if err != nil {
		return fmt.Errorf("read lease file: %w", err)
	}
	if err := checkPages(whole); err != nil {
		return &corruptError{cause: err}
	}
	old, err := bolt.Open(s.path(), 0o600, s.boltOptions(true))
	if err != nil {
		return s.openError(err)
	}
	if err := old.View(s.copyTo); err != nil {
		return errors.Join(err, old.Close())
	}
	if err := old.Close(); err != nil {
		return fmt.Errorf("close lease file: %w", err)
	}
	if err := os.Rename(s.path()+".new", s.path()); err != nil {
		return fmt.Errorf("replace lease file: %w", err)
	}
	return nil
}

func (s *Store) copyTo(from *bolt.Tx) error {
	t, err := readTables(from)
	if err == nil && t != nil {
		err = t.check()
	}
	if err != nil {
		return &corruptError{cause: err}
	}
	path := s.path() + ".new"
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove unfinished copy: %w", err)
	}
	db, err := bolt.Open(path, 0o600, s.boltOptions(false))
	if err != nil {
		return fmt.Errorf("make lease file: %w", err)
	}
	err = db.Update(func(to *bolt.Tx) error {
		into, err := makeTables(to)
		if err != nil || t == nil {
			return err
		}
		return t.copyInto(into)
	})
	if err == nil {
		err = db.Sync()
	}
	return errors.Join(err, db.Close())
}

func (t *tables) copyInto(into *tables) error {
	for name, from := range t.buckets() {
		to := *into.buckets()[name]
		if err := (*from).ForEach(to.Put); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
		if err := to.SetSequence((*from).Sequence()); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	return nil
}
