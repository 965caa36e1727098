package cni

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"
)

// Where nobody listens nothing is bound, and DEL gives addresses back; an agent that has no time still has them bound.
func TestNoAgentOrBusy(t *testing.T) {
	socket := func(t *testing.T, path string) int {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	for _, tt := range []struct {
		name   string
		listen func(t *testing.T, path string)
		none   bool
	}{
		{"no socket", func(*testing.T, string) {}, true},
		{"a socket of an agent that is gone", func(t *testing.T, path string) { socket(t, path) }, true},
		{"a file", func(t *testing.T, path string) {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"an agent that accepts nobody", func(t *testing.T, path string) {
			if err := unix.Listen(socket(t, path), 0); err != nil {
				t.Fatal(err)
			}
			for range 3 { // more than the queue takes
				fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = unix.Close(fd) })
				_ = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
			}
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.listen(t, filepath.Join(dir, SocketName))
			err := NewClient(dir).Detach(t.Context(), DetachRequest{ContainerID: "c", Interface: "eth0"})
			if err == nil || errors.Is(err, ErrNoAgent) != tt.none {
				t.Errorf("%v: no agent %v, want %v", err, errors.Is(err, ErrNoAgent), tt.none)
			}
			if e := asCNI(err); e.Code != types.ErrTryAgainLater {
				t.Errorf("the runtime is told code %d, %v; want to try again later", e.Code, e)
			}
		})
	}
}
