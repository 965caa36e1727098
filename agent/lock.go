package agent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// checkRunDir refuses a directory in which another user could put a socket or an attachment
// of his own in place of ours.
func checkRunDir(runDir string) error {
	var st unix.Stat_t
	if err := unix.Stat(runDir, &st); err != nil {
		return fmt.Errorf("run directory %s: %w", runDir, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return fmt.Errorf("runDir: %s is owned by user %d with mode %04o: others could replace the agent's socket; make it the agent's own, with mode 0700", runDir, st.Uid, st.Mode&0o7777)
	}
	return nil
}

// lock makes sure that one agent at a time serves a run directory. The kernel releases
// it with the process, however that ends.
func lock(runDir string) (*os.File, error) {
	if err := checkRunDir(runDir); err != nil {
		return nil, err
	}
	path := filepath.Join(runDir, "agent.lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, _ := os.ReadFile(path)
		return nil, errors.Join(fmt.Errorf("another agent (pid %s) serves %s: stop it first, or give this one another runDir",
			strings.TrimSpace(string(pid)), runDir), f.Close())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	if err := f.Truncate(0); err == nil {
		_, err = fmt.Fprintln(f, os.Getpid())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("write %s: %w", path, err), f.Close())
	}
	return f, nil
}

// lockTable makes sure that one agent at a time writes the table of this network
// namespace, whatever its run directory: names of abstract unix sockets belong to a
// network namespace (unix(7)), and the kernel frees one with its process.
func lockTable() (io.Closer, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@nftcni-table", Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errors.New("another agent keeps the table of this network namespace: stop it first (two run directories do not make two tables)")
	}
	if err != nil {
		return nil, fmt.Errorf("lock the table: %w", err)
	}
	return ln, nil
}
