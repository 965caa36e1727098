package main

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// tableSocketName is the name under which systemd keeps the socket that owns the table.
const tableSocketName = "nftcni-table"

// notifySystemd sends state (sd_notify(3), such as "READY=1") and files to the service manager.
// Without one it does nothing.
func notifySystemd(state string, files ...*os.File) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer unix.Close(fd)
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	// A leading @ is an abstract socket to SockaddrUnix as to sd_notify.
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: name}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// storeTableSocket hands the socket that owns the table to systemd, which keeps it while
// no agent runs (FileDescriptorStoreMax in the unit).
func storeTableSocket(f *os.File) error {
	return notifySystemd("FDSTORE=1\nFDPOLL=0\nFDNAME="+tableSocketName, f)
}

// storedTableSocket is the socket that a predecessor handed to systemd, or nil
// (sd_listen_fds(3): descriptors from 3 on, for the process LISTEN_PID).
func storedTableSocket() *os.File {
	const first = 3
	if pid, err := strconv.Atoi(os.Getenv("LISTEN_PID")); err != nil || pid != os.Getpid() {
		return nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 1 {
		return nil
	}
	for fd := first; fd < first+n; fd++ {
		unix.CloseOnExec(fd)
	}
	for fd := first + 1; fd < first+n; fd++ { // older ones, of agents that could not use theirs
		_ = unix.Close(fd)
	}
	return os.NewFile(first, tableSocketName)
}
