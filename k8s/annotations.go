package k8s

// AnnotationAddresses is the Pod annotation in which the agent of the pod's node
// publishes the pod's addresses, separated by commas, when CNI ADD returns: before the
// kubelet reports them as status.podIPs. A reader trusts it only within the
// spec.podCIDRs of the pod's node.
const AnnotationAddresses = "nftcni.io/addresses"

// AnnotationPublicKey is the Node annotation in which a node publishes its WireGuard
// public keys for encryption between nodes: one or, while it rotates, two, separated by
// a space. Each is 32 bytes in base64, after "0:" or "1:" where it has a parity.
const AnnotationPublicKey = "nftcni.io/wireguard-keys"

// AnnotationMeshAddresses is the Node annotation in which a node publishes the addresses
// that others send its pods' packets to, where its configuration chooses others than
// status.addresses: at most one of each family, separated by a comma.
const AnnotationMeshAddresses = "nftcni.io/mesh-addresses"

// annotationConfigHash is the kubelet's annotation on mirror pods: the UID of the
// static pod (k8s.io/kubernetes/pkg/kubelet/types.ConfigHashAnnotationKey).
const annotationConfigHash = "kubernetes.io/config.hash"
