package debug

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
)

var update = flag.Bool("update", false, "rewrite the golden output in testdata/script")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"nftcni": func() { os.Exit(runCommand()) }})
}

// runCommand is main's command line as far as it is this package's.
func runCommand() int {
	root := &cobra.Command{Use: "nftcni", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(NewCommand(), NewPolicyCommand())
	err := root.ExecuteContext(context.Background())
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, "nftcni:", err)
	if e, ok := errors.AsType[*ExitError](err); ok {
		return e.Status
	}
	return 1
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", UpdateScripts: *update})
}
