package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/cni"
)

// newAgentReadyCommand is what the readiness probe of the DaemonSet runs: the socket is
// a unix socket, and the image has no shell.
func newAgentReadyCommand() *cobra.Command {
	var runDir string
	cmd := &cobra.Command{
		Use:     "ready",
		Example: "  nftcni agent ready",
		Short:   "Say whether the agent on this node can serve, as the CNI verb STATUS does",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c := cni.NewClient(runDir)
			r, err := c.Ready(cmd.Context())
			if err != nil {
				return err
			}
			if !r.Ready {
				return errors.New("not ready: " + r.Reason)
			}
			fmt.Fprintln(cmd.OutOrStdout(), "ready")
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", cni.DefaultRunDir, "the agent's runDir (its socket is in it)")
	return cmd
}
