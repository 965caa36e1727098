package main

import (
	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/debug"
)

// newPolicyCommand is `nftcni policy`: the engine without a node.
func newPolicyCommand() *cobra.Command { return debug.NewPolicyCommand() }
