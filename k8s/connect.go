package k8s

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// ClusterOptions of NewCluster.
type ClusterOptions struct {
	// Kubeconfig is the path of a kubeconfig file; empty: the service account of the
	// pod this runs in. Exec credential plugins are refused: nftcni runs no helpers.
	Kubeconfig string
	// Server replaces the URL of the API server, if not empty. kube-proxy may not work
	// before its node's CNI does, so the Service address is not always usable.
	Server string
	// Node is the name of this node's Node object; the host named in Events.
	Node string
	Log  *slog.Logger // nil: discard
}

// clients of the two API groups that are used. The full clientset would bring the types
// of all groups into the binary, and into the start of every CNI call.
type clients struct {
	core, networking rest.Interface
	transport        http.RoundTripper
	tokenFile        string // of a kubeconfig, for keepToken
}

func connect(o ClusterOptions) (clients, error) {
	cfg, err := loadConfig(o)
	if err != nil {
		return clients{}, err
	}
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), networkingv1.AddToScheme(scheme)); err != nil {
		return clients{}, fmt.Errorf("register API types: %w", err)
	}
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.UserAgent = "nftcni-agent"
	cfg.WarningHandler = rest.NoWarnings{}
	cfg.QPS, cfg.Burst = 50, 100
	httpClient, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return clients{}, fmt.Errorf("connect to the API server: %w", err)
	}
	group := func(path string, gv schema.GroupVersion) (rest.Interface, error) {
		c := rest.CopyConfig(cfg)
		c.APIPath, c.GroupVersion = path, &gv
		return rest.RESTClientForConfigAndClient(c, httpClient)
	}
	core, err1 := group("/api", corev1.SchemeGroupVersion)
	networking, err2 := group("/apis", networkingv1.SchemeGroupVersion)
	if err := errors.Join(err1, err2); err != nil {
		return clients{}, fmt.Errorf("connect to the API server: %w", err)
	}
	c := clients{core: core, networking: networking, transport: httpClient.Transport}
	if o.Kubeconfig != "" { // the kubelet renews the token of a pod
		c.tokenFile = cfg.BearerTokenFile
	}
	return c, nil
}

func loadConfig(o ClusterOptions) (*rest.Config, error) {
	var cfg *rest.Config
	var err error
	if o.Kubeconfig == "" {
		if cfg, err = rest.InClusterConfig(); errors.Is(err, rest.ErrNotInCluster) && o.Server != "" {
			cfg = &rest.Config{} // a server that asks for no credentials, like kubectl proxy
		} else if err != nil {
			return nil, fmt.Errorf("no kubeconfig is given and this is not a pod with a service account: give --kubeconfig or --manifests: %w", err)
		}
	} else if cfg, err = clientcmd.BuildConfigFromFlags(o.Server, o.Kubeconfig); err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", o.Kubeconfig, err)
	}
	if o.Server != "" {
		cfg.Host = o.Server
	}
	if cfg.ExecProvider != nil || cfg.AuthProvider != nil {
		return nil, fmt.Errorf("kubeconfig %s: exec and auth-provider credentials are not supported: use a token, tokenFile or client certificate", o.Kubeconfig)
	}
	return cfg, nil
}
