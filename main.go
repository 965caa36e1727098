// Command nftcni gives a Linux node pod networking and network policy. By the name it is
// started as, and by CNI_COMMAND, it is the CNI plugin, the IPAM plugin, the agent or the
// command line (docs/architecture.md).
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/cni"
	_ "github.com/nftcni/nftcni/cni/start" // is the plugin before anything else is initialised
	"github.com/nftcni/nftcni/debug"
)

func main() {
	name := filepath.Base(os.Args[0])
	// Plugin mode comes before any cobra tree or Kubernetes client: a runtime starts us
	// for every pod, and waits. Under its own names the plugin has run already (cni/start).
	if os.Getenv("CNI_COMMAND") != "" {
		if name == "nftcni-ipam" {
			os.Exit(cni.IPAMMain())
		}
		os.Exit(cni.Main())
	}
	os.Exit(commandLine(name, os.Args[1:]))
}

// commandLine runs the cobra tree and returns the exit status.
func commandLine(name string, args []string) int {
	ctx, stop := untilSignal(syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	root := newRootCommand()
	if name == "nftcni-agent" {
		args = append([]string{"agent"}, args...)
	}
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "nftcni:", err)
	if e, ok := errors.AsType[*debug.ExitError](err); ok {
		return e.Status
	}
	if s, ok := errors.AsType[signalled](context.Cause(ctx)); ok {
		return 128 + int(s.Signal)
	}
	return 1
}

// signalled is why a context ended: what fails after it exits with 128 and the signal, as
// a shell reports a command that a signal killed.
type signalled struct{ syscall.Signal }

func (s signalled) Error() string { return s.String() }

// Is lets what asks whether it was told to stop see that it was.
func (s signalled) Is(target error) bool { return target == context.Canceled }

// untilSignal is signal.NotifyContext with a cause that holds the signal.
func untilSignal(signals ...os.Signal) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	got := make(chan os.Signal, 1)
	signal.Notify(got, signals...)
	go func() {
		select {
		case s := <-got:
			if s, ok := s.(syscall.Signal); ok {
				cancel(signalled{s})
			}
		case <-ctx.Done():
		}
	}()
	return ctx, func() { signal.Stop(got); cancel(nil) }
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "nftcni",
		Short: "Pod networking and network policy with nothing but nftables",
		Long: "nftcni is a CNI plugin and NetworkPolicy engine for Linux nodes.\n\n" +
			"The container runtime starts it with CNI_COMMAND set; systemd or a DaemonSet runs\n" +
			"`nftcni agent`; `nftcni debug` shows what is in force, and why.",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
	}
	root.AddCommand(newAgentCommand(), debug.NewCommand(), newDemoCommand(), newVersionCommand(),
		newInstallCommand(), newUninstallCommand(), newPolicyCommand(), newManCommand())
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (%s --help has the flags)", err, cmd.CommandPath())
	})
	root.InitDefaultCompletionCmd()
	if c, _, err := root.Find([]string{"completion"}); err == nil && c != root {
		debug.Group(c)
	}
	return root
}
