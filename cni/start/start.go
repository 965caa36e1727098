// Package start runs the CNI plugin before the rest of the program is initialised. Importing
// it is all there is to do.
//
// A runtime starts the plugin for every pod, and one binary holds the agent and the command
// line as well: initialising their packages takes longer than an ADD's own work. The linker
// initialises packages as soon as their imports are, those of the plugin before most of
// Kubernetes' (docs/decisions/0024). What it does not reach here, main does: nothing depends
// on it but time.
package start

import (
	"os"
	"path/filepath"

	"github.com/nftcni/nftcni/cni"
)

// The one initialiser of the product with an effect; a plain start of nftcni has no
// CNI_COMMAND and passes by.
var _ = plugin()

// plugin ends the process when it is a plugin, called by one of its own names.
func plugin() struct{} {
	if os.Getenv("CNI_COMMAND") != "" {
		switch filepath.Base(os.Args[0]) {
		case "nftcni":
			os.Exit(cni.Main())
		case "nftcni-ipam":
			os.Exit(cni.IPAMMain())
		}
	}
	return struct{}{}
}
