package debug

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

// Exit statuses beside 0 and 1.
const (
	// ExitDisagree: the oracle and the kernel's tables give different answers.
	ExitDisagree = 2
	// ExitCuts: the change would cut live connections.
	ExitCuts = 3
)

// ExitError is an error with an exit status of its own.
type ExitError struct {
	Status int
	Err    error
}

func (e *ExitError) Error() string { return e.Err.Error() }
func (e *ExitError) Unwrap() error { return e.Err }

// session is what every command works with.
type session struct {
	runDir, stateDir string
	format           string
	shared           *sharedSnapshot // of a command that needs the cluster more than once
}

// NewCommand returns `nftcni debug` with its subcommands.
func NewCommand() *cobra.Command {
	s := &session{}
	cmd := &cobra.Command{
		Use:   "debug",
		Short: "Ask what is in force on this node, and why",
		Long: "Ask what is in force on this node, and why.\n\n" +
			"Every command prints a table, or with -o json|yaml a stable form for programs.",
		PersistentPreRunE: s.prepare,
	}
	f := cmd.PersistentFlags()
	f.StringVar(&s.runDir, "run-dir", cni.DefaultRunDir, "the agent's runDir (its socket is in it)")
	f.StringVar(&s.stateDir, "state-dir", cni.DefaultStateDir, "the agent's stateDir (the leases are in it)")
	f.StringVarP(&s.format, "output", "o", "table", "table, json or yaml")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(s.statusCommand(), s.podsCommand(), s.policiesCommand(), s.ipamCommand(), s.whyCommand(),
		s.matrixCommand(), s.graphCommand(), s.impactCommand(),
		s.traceCommand(), s.captureCommand(), s.flowsCommand(), s.dropsCommand(),
		s.waitCommand(), s.verifyCommand(), s.doctorCommand(), s.bundleCommand())
	return Group(cmd)
}

// Group makes a command that only holds others refuse what is none of them: cobra prints its
// help instead, with status 0.
func Group(cmd *cobra.Command) *cobra.Command {
	cmd.SuggestionsMinimumDistance = 2
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = "; did you mean " + near[0] + "?"
		}
		return fmt.Errorf("%q is no command of %s%s (%s --help lists them)", args[0], cmd.CommandPath(), hint, cmd.CommandPath())
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

// garbageShare is the GOGC of these commands: they end before there is much garbage, and at
// 10,000 pods a tenth of their time went into collecting what is still needed.
const garbageShare = 400

// prepare refuses an unknown format before anything is done.
func (s *session) prepare(*cobra.Command, []string) error {
	if s.format != "table" && s.format != "json" && s.format != "yaml" {
		return errFormat(s.format)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbageShare)
	}
	return nil
}

// get asks the agent and explains what to do when it does not run.
func (s *session) get(ctx context.Context, path string, v any) error {
	socket := filepath.Join(s.runDir, cni.SocketName)
	err := agent.NewClient(socket).Get(ctx, path, v)
	switch {
	case agentGone(err):
		return fmt.Errorf("%w on %s: start it (nftcni agent, systemctl start nftcni-agent), or name its runDir with --run-dir", errNoAgent, socket)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("the agent on %s answers root and its own user only: %w", socket, err)
	}
	return err
}
