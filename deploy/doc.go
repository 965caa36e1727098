// Package deploy holds what puts nftcni on a node and takes it off again: the Kubernetes
// manifest, the systemd unit, the drop-ins for other network daemons, and the
// network configuration that the container runtime reads. It changes files only; links,
// routes and the table are removed by those who write them (packages cni and nft).
package deploy
