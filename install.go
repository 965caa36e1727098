package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nftcni/nftcni/deploy"
)

const installHelp = `Put nftcni on this node: the binary with its links, the systemd unit of the agent, a
configuration file with every setting, drop-ins for systemd-networkd, udev and
NetworkManager, and the forwarding sysctls. The agent writes the network configuration for
the container runtime itself, when it can serve.

Network configurations of other CNI plugins are moved aside (*` + deploy.DisabledSuffix + `), not
deleted: new pods get nftcni, pods that run keep what they have. uninstall puts them back.
Running it again upgrades; settings that exist are kept.`

func newInstallCommand() *cobra.Command {
	o := deploy.Options{Layout: deploy.DefaultLayout()}
	var kubeconfig, manifests string
	var sysctlOnly bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put nftcni on this node (systemd); uninstall takes it off again",
		Long:  installHelp,
		Example: "  nftcni install --kubeconfig /etc/nftcni/kubeconfig\n" +
			"  nftcni install --manifests /etc/nftcni/manifests",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case sysctlOnly:
				return setForwarding(cmd.OutOrStdout())
			case o.FilesOnly:
			case (kubeconfig == "") == (manifests == ""):
				return errors.New("install needs one of --kubeconfig FILE and --manifests DIR: it is where the agent takes " +
					"its objects from (docs/install.md says how to make the kubeconfig)")
			case kubeconfig != "":
				o.Agent = []string{"--kubeconfig", kubeconfig}
			default:
				o.Agent = []string{"--manifests", manifests}
			}
			return install(cmd.OutOrStdout(), o)
		},
	}
	f := cmd.Flags()
	layoutFlags(f, &o.Layout)
	f.StringVar(&o.Prefix, "cni-conf-prefix", deploy.DefaultPrefix, "prefix of the network configuration's file name, 00- to 99-")
	f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig of the agent")
	f.StringVar(&manifests, "manifests", "", "directory of Kubernetes YAML that the agent follows, instead of an API server")
	f.BoolVar(&o.PolicyOnly, "policy-only", false, "enforce beside another CNI plugin, which keeps wiring pods (network: none)")
	f.BoolVar(&o.KeepOthers, "keep-others", false, "leave the network configurations of other CNI plugins in place")
	f.BoolVar(&o.FilesOnly, "files-only", false, "only put the binary and nftcni-ipam into the CNI plugin directory (for the DaemonSet)")
	f.BoolVar(&sysctlOnly, "sysctl-only", false, "only switch forwarding on (for the DaemonSet)")
	return cmd
}

func layoutFlags(f *pflag.FlagSet, l *deploy.Layout) {
	f.StringVar(&l.Root, "root", "", "directory in which the node's file system is found")
	f.StringVar(&l.BinDir, "cni-bin-dir", l.BinDir, "directory of CNI plugins")
	f.StringVar(&l.ConfDir, "cni-conf-dir", l.ConfDir, "directory of network configurations")
	f.StringVar(&l.ConfigDir, "config-dir", l.ConfigDir, "directory of the agent's settings")
	f.StringVar(&l.CommandDir, "command-dir", l.CommandDir, "directory of links for people and units")
	f.StringVar(&l.SystemdDir, "systemd-dir", l.SystemdDir, "directory of systemd's configuration")
	f.StringVar(&l.StateDir, "state-dir", l.StateDir, "the agent's stateDir")
	f.StringVar(&l.RunDir, "run-dir", l.RunDir, "the agent's runDir")
}

func install(out io.Writer, o deploy.Options) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("open own executable: %w", err)
	}
	defer self.Close()
	o.Executable = self
	steps, err := deploy.Install(o)
	for _, s := range steps {
		fmt.Fprintln(out, s)
	}
	if err != nil || o.FilesOnly {
		return err
	}
	if o.Root == "" && !o.PolicyOnly {
		if err := setForwarding(out); err != nil {
			return err
		}
		if err := reportOthers(out, o.Layout); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "\nNow: systemctl daemon-reload && systemctl restart nftcni-agent\n"+
		"then: nftcni debug status")
	return nil
}

func setForwarding(out io.Writer) error {
	changed, err := deploy.SetForwarding("/proc/sys")
	for _, s := range changed {
		fmt.Fprintf(out, "%-12s %s\n", "set", s)
	}
	return err
}
