package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

//go:embed testdata/demo
var demoFiles embed.FS

// errDemoFailed is returned by the process that the user started; the process in the
// namespaces has said why.
var errDemoFailed = errors.New("demo failed")

func newDemoCommand() *cobra.Command {
	var inside bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a whole node at work in network namespaces, and check it with real packets",
		Long: `Makes a node, pods and an outside host in network namespaces, starts the agent on a
folder of manifests, attaches every pod through the CNI plugin, and asks with real TCP,
UDP and ICMP packets, over IPv4 and IPv6, who reaches whom. Prints what the policies
should allow beside what was seen, then changes a policy and a pod's label and shows
what changed and how long it took. Exits with 1 when anything differs, with 130 when it
is interrupted.

Needs root, or user namespaces for an ordinary user. Touches nothing of the host and
leaves nothing behind.`,
		Example: "  nftcni demo\n  nftcni demo | less",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !inside {
				return demoInNamespaces(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			}
			d := newDemo(cmd.OutOrStdout(), cmd.ErrOrStderr())
			return d.run(cmd.Context())
		},
	}
	cmd.Flags().BoolVar(&inside, "inside", false, "this process is already in namespaces of its own")
	// A hidden flag that exists cannot fail to be hidden.
	_ = cmd.Flags().MarkHidden("inside")
	return cmd
}

// nodeNamespaces are those of a node apart from the host: network and mounts, and for
// an ordinary user a user namespace in which it is root. The process dies with its parent.
func nodeNamespaces() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return attr
}

// demoInNamespaces runs the demo in a process of its own; its end, however it comes,
// ends the node and everything in it.
func demoInNamespaces(ctx context.Context, stdout, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "demo", "--inside")
	cmd.Args[0] = "nftcni"
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = nodeNamespaces()
	wait, err := startTied(cmd, 10*time.Second)
	if err != nil {
		return explainRestricted(err)
	}
	if err := wait(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("demo interrupted: %w", context.Cause(ctx))
		}
		return errDemoFailed
	}
	return nil
}

// startTied starts cmd so that it gets SIGTERM, and SIGKILL after grace, when its
// context ends, and the signal of its SysProcAttr when this process dies. The kernel ties the
// latter to the thread, so one thread is kept for as long as cmd runs.
func startTied(cmd *exec.Cmd, grace time.Duration) (wait func() error, err error) {
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = grace
	started, ended := make(chan error), make(chan struct{})
	var result error
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			result = cmd.Wait()
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return func() error { <-ended; return result }, nil
}

// explainRestricted adds the remedy when the system refuses namespaces to this user.
func explainRestricted(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ENOSPC) {
		return err
	}
	return fmt.Errorf("this system restricts user namespaces for ordinary users; run it as root (sudo), or allow them: "+
		"sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04 and newer), "+
		"sysctl kernel.unprivileged_userns_clone=1 (older Debian), sysctl user.max_user_namespaces=15000 (where it is 0); "+
		"in a container, give it CAP_SYS_ADMIN and CAP_NET_ADMIN: %w", err)
}

// progress says on one line of a terminal, or on a line each, what is being done.
type progress struct {
	w        io.Writer
	terminal bool
}

func newProgress(w io.Writer) progress { return progress{w, isTerminal(w)} }

func (p progress) step(format string, args ...any) {
	if p.terminal {
		fmt.Fprintf(p.w, "\r\x1b[K"+format, args...)
		return
	}
	fmt.Fprintf(p.w, format+"\n", args...)
}

// clear ends the line of a terminal before something else is printed.
func (p progress) clear() {
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
