package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/cni"
)

func newAgentRotateCommand() *cobra.Command {
	var runDir string
	cmd := &cobra.Command{
		Use:     "rotate-key",
		Example: "  nftcni agent rotate-key",
		Short:   "Give this node a new WireGuard key without losing a packet",
		Long: "Give this node a new WireGuard key without losing a packet: both keys are in force until\n" +
			"every other node has moved to the new one and nothing has come with the old one for four\n" +
			"minutes; then the agent removes the old one by itself. `nftcni debug doctor` says how far it is.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := agent.NewClient(filepath.Join(runDir, cni.SocketName)).RotateKey(cmd.Context())
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "new key made; %d nodes have yet to move\npublic keys, the newest last: %s\n", s.Rotation.Moving, s.PublicKey)
			return err
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", cni.DefaultRunDir, "the agent's runDir (its socket is in it)")
	return cmd
}
