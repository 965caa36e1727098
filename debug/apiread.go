package debug

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

// apiFlags say how an API server is read.
type apiFlags struct{ kubeconfig, server string }

func (a *apiFlags) register(f *pflag.FlagSet) {
	f.StringVar(&a.kubeconfig, "kubeconfig", "", "kubeconfig for a fresh read of the API server")
	f.StringVar(&a.server, "server", "", "URL of the API server, in place of the kubeconfig's")
}

// generation reads metadata.generation of a NetworkPolicy.
func (a apiFlags) generation(ctx context.Context, name string) (int64, error) {
	namespace, object, ok := strings.Cut(name, "/")
	if !ok {
		return 0, fmt.Errorf("policy %q: it is written NAMESPACE/NAME", name)
	}
	cluster, err := a.cluster()
	if err != nil {
		return 0, err
	}
	return cluster.PolicyGeneration(ctx, policy.Name{Namespace: namespace, Name: object})
}

func (a apiFlags) cluster() (*k8s.Cluster, error) {
	return k8s.NewCluster(k8s.ClusterOptions{Kubeconfig: a.kubeconfig, Server: a.server})
}

// backend is a pod behind a Service and the port that the Service sends to there.
type backend struct {
	endpoint
	port uint16
}

// backends reads a Service and returns the pods its selector selects, with the target of
// the port asked for: policy judges what packets reach after the Service's DNAT.
func (a apiFlags) backends(ctx context.Context, c *policy.Cluster, name string, svc service) ([]backend, error) {
	namespace, object, ok := strings.Cut(name, "/")
	if !ok {
		return nil, fmt.Errorf("service %q: it is written svc/NAMESPACE/NAME", name)
	}
	cluster, err := a.cluster()
	if err != nil {
		return nil, err
	}
	s, err := cluster.Service(ctx, policy.Name{Namespace: namespace, Name: object})
	if err != nil {
		return nil, err
	}
	if len(s.Spec.Selector) == 0 {
		return nil, fmt.Errorf("service %s selects no pods (it is without selector, or headless for others): ask for one of its addresses", name)
	}
	target, err := targetOf(s.Spec.Ports, svc)
	if err != nil {
		return nil, fmt.Errorf("service %s: %w", name, err)
	}
	out := backendsOf(c, namespace, s.Spec.Selector, target, svc)
	if len(out) == 0 {
		return nil, fmt.Errorf("service %s has no backend with an address and port %s", name, target.String())
	}
	return out, nil
}

// targetOf is the target of a Service's port; the port itself when it names none.
func targetOf(ports []corev1.ServicePort, svc service) (intstr.IntOrString, error) {
	var known []string
	for _, p := range ports {
		protocol := cmp.Or(string(p.Protocol), "TCP")
		if protocol == protocolName(svc.protocol) && p.Port == int32(svc.port) {
			if p.TargetPort == (intstr.IntOrString{}) {
				return intstr.FromInt32(p.Port), nil
			}
			return p.TargetPort, nil
		}
		known = append(known, fmt.Sprintf("%s/%d", protocol, p.Port))
	}
	return intstr.IntOrString{}, fmt.Errorf("it has no port %s/%d, but %s", protocolName(svc.protocol), svc.port, orDash(strings.Join(known, ", ")))
}

func backendsOf(c *policy.Cluster, namespace string, selector map[string]string, target intstr.IntOrString, svc service) []backend {
	var out []backend
	for i := range c.Pods {
		p := &c.Pods[i]
		if p.Namespace != namespace || p.Finished || len(p.Addrs) == 0 || !hasLabels(p.Labels, selector) {
			continue
		}
		port := uint16(target.IntVal)
		for _, np := range p.Ports {
			if target.Type == intstr.String && np.Name == target.StrVal && np.Protocol == svc.protocol {
				port = np.Port
			}
		}
		if port != 0 {
			out = append(out, backend{endpoint{p.Name.String(), p.Addrs}, port})
		}
	}
	return out
}

func hasLabels(l policy.Labels, want map[string]string) bool {
	for k, v := range want {
		if got, ok := l.Get(k); !ok || got != v {
			return false
		}
	}
	return true
}
