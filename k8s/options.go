package k8s

import "log/slog"

// ManifestOptions of NewManifests; the zero value is usable.
type ManifestOptions struct {
	Log *slog.Logger // nil: discard
}

// ClusterOptions of NewCluster.
type ClusterOptions struct {
	// Kubeconfig is the path of a kubeconfig file; empty: the service account of the
	// pod this runs in. Exec credential plugins are refused: nftcni runs no helpers.
	Kubeconfig string
	// Server replaces the URL of the API server, if not empty. kube-proxy may not work
	// before its node's CNI does, so the Service address is not always usable.
	Server string
	// Node is the name of this node's Node object; used as the source of Events.
	Node string
	Log  *slog.Logger // nil: discard
}
