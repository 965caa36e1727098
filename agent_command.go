package main

import (
	"cmp"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/k8s"
)

func newAgentCommand() *cobra.Command {
	var manifests, config, kubeconfig, server, node, flowLog string
	var serving servingFlags
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent: objects in, nftables out",
		Long: "Run the agent: it follows a directory of manifests or an API server, answers the plugin\n" +
			"on a local socket, and keeps the table inet nftcni equal to what is wanted.\n" +
			"Stopping it leaves the rules in force.",
		Example: "  nftcni agent --manifests /etc/nftcni/manifests --config /etc/nftcni/agent.yaml\n" +
			"  nftcni agent --kubeconfig /etc/nftcni/kubeconfig",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := agent.LoadConfig(config)
			if err != nil {
				return err
			}
			c.Node, c.FlowLog = cmp.Or(node, c.Node), cmp.Or(flowLog, c.FlowLog)
			log := c.Logger(os.Stderr)
			o := agent.Options{Config: c, Log: log, WaitForPods: manifests == "", Version: version}
			if o.KeepSmall = os.Getenv("GOGC") == ""; o.KeepSmall {
				debug.SetGCPercent(50) // memory is every node's, and the agent makes little garbage
			}
			o.TableSocket, o.KeepSocket = storedTableSocket(), storeTableSocket
			o.Listening = func() error { return notifySystemd("READY=1") }
			o.Serving = func() error {
				log.Info("serving", "node", c.Node, "socket", c.Socket(), "version", version)
				return serving.writeConflist(log)
			}
			if o.Source, err = newSource(manifests, k8s.ClusterOptions{Kubeconfig: kubeconfig, Server: server, Node: c.Node, Log: log}); err != nil {
				return err
			}
			if c, ok := o.Source.(*k8s.Cluster); ok {
				o.Publish, o.PublishKey, o.PublishMeshAddresses = c.PublishAddresses, c.PublishNodeKey, c.PublishMeshAddresses
			}
			return agent.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&manifests, "manifests", "", "directory of Kubernetes YAML to follow instead of an API server")
	f.StringVar(&config, "config", "", "configuration file (YAML); default: every setting's default")
	f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig of the API server; default: the pod's service account")
	f.StringVar(&node, "node", "", "name of this node's Node object; default: the configuration's, or the host name")
	f.StringVar(&flowLog, "flow-log", "", "write new connections to this file as JSON lines; default: the configuration's")
	serving.register(f)
	f.StringVar(&server, "server", "", "URL of the API server, in place of the kubeconfig's")
	cmd.AddCommand(newAgentReadyCommand(), newAgentRotateCommand())
	return cmd
}

func newSource(manifests string, o k8s.ClusterOptions) (k8s.Source, error) {
	if manifests == "" {
		return k8s.NewCluster(o)
	}
	if o.Kubeconfig != "" || o.Server != "" {
		return nil, fmt.Errorf("flag --manifests excludes --kubeconfig and --server: objects come from one place")
	}
	return k8s.NewManifests(manifests, k8s.ManifestOptions{Log: o.Log}), nil
}
