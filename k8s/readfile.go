package k8s

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// errBusy: the file is open for writing, so what it holds may be half of what it will.
var errBusy = errors.New("file is open for writing")

// readFile reads a whole file as one writer left it. It takes a read lease for as long
// as it reads: the kernel grants none while anyone has the file open for writing
// (errBusy) and makes whoever opens it for writing or truncates
// it wait until the lease is given back. Where leases are not to be had (a foreign
// owner's file without CAP_LEASE, some network file systems) a file that changed while
// it was read is busy too. At most MaxFileSize+1 bytes are returned.
func readFile(path string) (data []byte, err error) {
	// O_NONBLOCK: opening a FIFO must not block.
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer func() { err = errors.Join(err, f.Close()) }() // gives the lease back too
	before, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if before.IsDir() {
		return nil, fmt.Errorf("read %s: a directory is in its place: %w", path, fs.ErrNotExist)
	}
	if !before.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a regular file", path)
	}
	_, leaseErr := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(leaseErr, unix.EAGAIN) {
		return nil, errBusy
	}
	if data, err = io.ReadAll(io.LimitReader(f, MaxFileSize+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	after, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if leaseErr != nil && changed(before, after) {
		return nil, errBusy
	}
	return data, nil
}

func changed(before, after os.FileInfo) bool {
	return before.Size() != after.Size() || !before.ModTime().Equal(after.ModTime())
}

// readAnyway reads a whole file, complete or not.
func readAnyway(path string) (data []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("read %s: not a regular file", path))
	}
	if data, err = io.ReadAll(io.LimitReader(f, MaxFileSize+1)); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return data, nil
}
