package k8s

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watchMask: a write counts when the writer closes the file, not before; a file that
// was moved in is complete.
const watchMask = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE |
	unix.IN_CREATE | unix.IN_ATTRIB | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// A watcher reports which files below a directory were written or are gone. One
// goroutine uses it.
type watcher struct {
	root   string
	fd     int // inotify
	cancel int // eventfd: readable when wait must return
	dirs   map[int]string
	// blind: some directory could not be watched, so changes in it are found only by
	// looking again.
	blind error
}

// changes is what happened since the last call of wait.
type changes struct {
	paths  map[string]bool // files written, moved in or gone
	rescan bool            // anything may have changed
}

func newWatcher(root string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify_init (fs.inotify.max_user_instances may be too small): %w", err)
	}
	cancel, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("eventfd: %w", err), unix.Close(fd))
	}
	return &watcher{root: root, fd: fd, cancel: cancel, dirs: map[int]string{}}, nil
}

func (w *watcher) close() error { return errors.Join(unix.Close(w.fd), unix.Close(w.cancel)) }

// interrupt makes wait return; it may be called from another goroutine.
func (w *watcher) interrupt() error {
	_, err := unix.Write(w.cancel, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	return err
}

// scan watches every directory below the root and returns the manifests there are.
// Directories come under watch before they are listed, so nothing is missed in between.
func (w *watcher) scan() (files map[string]bool, err error) {
	w.blind = nil
	files, unread, err := listManifests(w.root, w.watch)
	w.blind = errors.Join(w.blind, unread)
	return files, err
}

// listManifests returns the paths of the manifests below root, or root itself if it is
// one, after calling enter for every directory on the way. Names that start with a dot
// are left out (a ConfigMap volume keeps its files in such directories and links to
// them); links to directories are not followed. unread says which directories could
// not be read; err is about root.
func listManifests(root string, enter func(dir string) error) (files map[string]bool, unread, err error) {
	files = map[string]bool{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil && path == root:
			return err
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			unread = errors.Join(unread, err)
			return nil
		case path != root && strings.HasPrefix(d.Name(), "."):
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		case d.IsDir():
			return enter(path)
		case isManifest(path):
			files[path] = true
		}
		return nil
	})
	return files, unread, err
}

func (w *watcher) watch(dir string) error {
	wd, err := unix.InotifyAddWatch(w.fd, dir, watchMask)
	switch {
	case errors.Is(err, unix.ENOENT) && dir != w.root:
		return filepath.SkipDir
	case errors.Is(err, unix.ENOSPC):
		w.blind = fmt.Errorf("watch %s: the limit fs.inotify.max_user_watches is reached: %w", dir, err)
		return nil
	case err != nil && dir != w.root:
		w.blind = fmt.Errorf("watch %s: %w", dir, err)
		return nil
	case err != nil:
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	w.dirs[wd] = dir
	return nil
}

func isManifest(path string) bool {
	switch filepath.Ext(path) {
	case ".yaml", ".yml", ".json":
		return !strings.HasPrefix(filepath.Base(path), ".")
	}
	return false
}

// wait returns when something changed, when timeout passed (negative: never), or after
// interrupt. What happened meanwhile is added to c.
func (w *watcher) wait(timeout time.Duration, c *changes) error {
	ms := -1
	if timeout >= 0 {
		ms = int((timeout + time.Millisecond - 1) / time.Millisecond)
	}
	fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}, {Fd: int32(w.cancel), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(fds, ms)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("poll: %w", err)
		}
		return w.drain(c)
	}
}

// drain reads every event that is queued.
func (w *watcher) drain(c *changes) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(w.fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case err != nil:
			return fmt.Errorf("read inotify: %w", err)
		}
		w.decode(buf[:n], c)
	}
}

// decode reads struct inotify_event records: wd, mask, cookie, len, name (inotify(7)).
func (w *watcher) decode(b []byte, c *changes) {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int(int32(binary.NativeEndian.Uint32(b)))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if size > len(b) {
			c.rescan = true
			return
		}
		name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:size]), "\x00")
		b = b[size:]
		w.event(wd, mask, name, c)
	}
}

func (w *watcher) event(wd int, mask uint32, name string, c *changes) {
	dir, known := w.dirs[wd]
	path := filepath.Join(dir, name)
	const gone = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_UNMOUNT
	switch {
	case mask&unix.IN_IGNORED != 0:
		delete(w.dirs, wd)
	case mask&unix.IN_MOVE_SELF != 0 && dir != w.root:
		// It may be outside the root now; scan finds it again if it is not.
		if _, err := unix.InotifyRmWatch(w.fd, uint32(wd)); err == nil {
			delete(w.dirs, wd)
		}
		c.rescan = true
	case mask&(unix.IN_Q_OVERFLOW|gone) != 0, !known:
		c.rescan = true
	case mask&unix.IN_ISDIR != 0:
		// A directory that came may already hold files; one that went held some.
		c.rescan = c.rescan || mask&unix.IN_ATTRIB == 0
	case strings.HasPrefix(name, "."):
		// The link through which a ConfigMap volume changes all of its files at once.
		c.rescan = c.rescan || name == "..data"
	case isManifest(path):
		c.paths[path] = true
	}
}
