package debug

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// apiFlags say how an API server is read.
type apiFlags struct{ kubeconfig, server string }

func (a *apiFlags) register(f *pflag.FlagSet) {
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "kubeconfig for a fresh read of the API server")
	f.StringVar(&a.server, "server", "", "URL of the API server, in place of the kubeconfig's")
}

// generation reads metadata.generation of a NetworkPolicy. A get without resourceVersion
// is a quorum read (Kubernetes API concepts, "Semantics for get and list").
func (a apiFlags) generation(ctx context.Context, name string) (int64, error) {
	namespace, policy, ok := strings.Cut(name, "/")
	if !ok {
		return 0, fmt.Errorf("policy %q: it is written NAMESPACE/NAME", name)
	}
	cfg, err := clientcmd.BuildConfigFromFlags(a.server, a.kubeconfig)
	if err != nil {
		return 0, fmt.Errorf("read kubeconfig: %w", err)
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return 0, fmt.Errorf("make API client: %w", err)
	}
	p, err := client.NetworkingV1().NetworkPolicies(namespace).Get(ctx, policy, metav1.GetOptions{})
	if err != nil {
		return 0, fmt.Errorf("read policy %s from the API server: %w", name, err)
	}
	return p.Generation, nil
}
