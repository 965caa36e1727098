package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/pflag"

	"github.com/nftcni/nftcni/deploy"
)

// servingFlags say what the agent does once it can serve, besides serving.
type servingFlags struct {
	confDir, prefix, conflist string
}

func (s *servingFlags) register(f *pflag.FlagSet) {
	f.StringVar(&s.confDir, "cni-conf-dir", "", "write the network configuration here when the agent can serve; default: write none")
	f.StringVar(&s.prefix, "cni-conf-prefix", deploy.DefaultPrefix, "prefix of that file's name, 00- to 99-")
	f.StringVar(&s.conflist, "conflist", "", "file with the network configuration to write; default: a built-in one, with addresses from Node.spec.podCIDRs")
}

// writeConflist lets the runtime give pods to this node.
func (s *servingFlags) writeConflist(log *slog.Logger) error {
	if s.confDir == "" {
		return nil
	}
	content := deploy.DefaultConflist()
	if s.conflist != "" {
		var err error
		if content, err = os.ReadFile(s.conflist); err != nil {
			return fmt.Errorf("read --conflist: %w", err)
		}
	}
	path, changed, err := deploy.WriteConflist(s.confDir, s.prefix, content)
	if err != nil {
		return err
	}
	log.Info("network configuration in place", "path", path, "changed", changed)
	return nil
}
