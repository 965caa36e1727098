package k8s

import (
	"net/netip"
	"slices"
	"unique"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilvalidation "k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	netutils "k8s.io/utils/net"

	"github.com/nftcni/nftcni/policy"
)

const nameRemedy = "use lower case letters, digits, '-' and, except in a namespace, '.'"

// checkMeta checks the parts of metadata that we read, as the API server would.
func checkMeta(m *metav1.ObjectMeta, namespaced bool, f *faults) {
	at := field.NewPath("metadata")
	if m.Name == "" {
		f.refuse(at.Child("name"), "name the object (generateName works only on an API server)", "required")
	} else {
		f.invalid(at.Child("name"), m.Name, nameRemedy, validation.NameIsDNSSubdomain(m.Name, false))
	}
	if namespaced {
		f.invalid(at.Child("namespace"), m.Namespace, nameRemedy, validation.NameIsDNSLabel(m.Namespace, false))
	} else if m.Namespace != "" {
		f.warn(at.Child("namespace"), "remove it", "not used: the object belongs to no namespace")
	}
	checkLabels(m.Labels, at.Child("labels"), f)
}

// convertNamespace sets the label kubernetes.io/metadata.name as the API server does.
func convertNamespace(ns *corev1.Namespace, f *faults) policy.Namespace {
	if ns.Name != "" {
		f.invalid(field.NewPath("metadata", "name"), ns.Name, nameRemedy, validation.NameIsDNSLabel(ns.Name, false))
	}
	return namespaceWith(ns.Name, ns.Labels)
}

// namespaceWith is the Namespace with these labels and the one every namespace has.
func namespaceWith(name string, labels map[string]string) policy.Namespace {
	m := make(map[string]string, len(labels)+1)
	for k, v := range labels {
		m[k] = v
	}
	m[corev1.LabelMetadataName] = name
	name = intern(name)
	return policy.Namespace{Name: name, Labels: policy.MakeLabels(m)}
}

// convertNode reads the addresses of type InternalIP and spec.podCIDRs (spec.podCIDR
// where that is absent).
func convertNode(n *corev1.Node, f *faults) policy.Node {
	out := policy.Node{Name: intern(n.Name), Labels: policy.MakeLabels(n.Labels)}
	out.PublicKey = convertPublicKeys(n.Annotations[AnnotationPublicKey], f)
	out.MeshAddrs = convertMeshAddrs(n.Annotations[AnnotationMeshAddresses], f)
	for i, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if addr, ok := parseAddr(a.Address, field.NewPath("status", "addresses").Index(i).Child("address"), f); ok {
			out.Addrs = appendAddr(out.Addrs, addr)
		}
	}
	cidrs, at := n.Spec.PodCIDRs, field.NewPath("spec", "podCIDRs")
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for i, c := range cidrs {
		if p, ok := parseCIDR(c, at.Index(i), f); ok {
			out.PodCIDRs = append(out.PodCIDRs, p)
		}
	}
	return out
}

// convertPod reads what policy needs of a Pod. The UID of a static pod's mirror is the
// hash of its file: that is what the kubelet gives the runtime, and so the plugin.
func convertPod(p *corev1.Pod, f *faults) policy.Pod {
	out := policy.Pod{
		Name:        policy.Name{Namespace: intern(p.Namespace), Name: p.Name},
		UID:         string(p.UID),
		Node:        intern(p.Spec.NodeName),
		Labels:      policy.MakeLabels(p.Labels),
		HostNetwork: p.Spec.HostNetwork,
		Finished:    p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Ports:       convertContainers(p, f),
	}
	if hash := p.Annotations[annotationConfigHash]; hash != "" && p.Annotations[corev1.MirrorPodAnnotationKey] != "" {
		out.UID = hash
	}
	if !p.CreationTimestamp.IsZero() {
		out.Created = p.CreationTimestamp.Unix()
	}
	ips, at := p.Status.PodIPs, field.NewPath("status", "podIPs")
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	for i, ip := range ips {
		if addr, ok := parseAddr(ip.IP, at.Index(i).Child("ip"), f); ok {
			out.Addrs = appendAddr(out.Addrs, addr)
		}
	}
	return out
}

// convertContainers collects the named ports: those of the containers in their order,
// then those of sidecars (init containers that are restarted always).
func convertContainers(p *corev1.Pod, f *faults) []policy.NamedPort {
	var out []policy.NamedPort
	for i := range p.Spec.Containers {
		at := field.NewPath("spec", "containers").Index(i).Child("ports")
		out = convertPorts(out, p.Spec.Containers[i].Ports, at, f)
	}
	for i := range p.Spec.InitContainers {
		c := &p.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			at := field.NewPath("spec", "initContainers").Index(i).Child("ports")
			out = convertPorts(out, c.Ports, at, f)
		}
	}
	return slices.Clip(out)
}

func convertPorts(out []policy.NamedPort, ports []corev1.ContainerPort, at *field.Path, f *faults) []policy.NamedPort {
	first := len(out)
	for i, p := range ports {
		path, ok, protocol := at.Index(i), true, policy.TCP
		if p.Protocol != "" {
			protocol, ok = convertProtocol(p.Protocol, path.Child("protocol"), f)
		}
		if p.ContainerPort < 1 || p.ContainerPort > 65535 {
			f.refuse(path.Child("containerPort"), "use a number from 1 to 65535", "invalid port %d", p.ContainerPort)
			ok = false
		}
		if p.Name == "" {
			continue
		}
		if msgs := utilvalidation.IsValidPortName(p.Name); len(msgs) > 0 {
			f.invalid(path.Child("name"), p.Name, `use at most 15 of a-z, 0-9 and "-", at least one of them a letter`, msgs)
			ok = false
		}
		if slices.ContainsFunc(out[first:], func(n policy.NamedPort) bool { return n.Name == p.Name }) {
			f.refuse(path.Child("name"), "names are unique within a container", "duplicate port name %s", quote(p.Name))
			ok = false
		}
		if ok {
			out = append(out, policy.NamedPort{Name: intern(p.Name), Protocol: protocol, Port: uint16(p.ContainerPort)})
		}
	}
	return out
}

// parseAddr reads an address as API servers before StrictIPCIDRValidation did. Zones
// are refused; IPv4-mapped addresses are unmapped.
func parseAddr(s string, at *field.Path, f *faults) (netip.Addr, bool) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		return a.Unmap(), true
	}
	if ip := netutils.ParseIPSloppy(s); ip != nil {
		a, _ := netip.AddrFromSlice(ip)
		a = a.Unmap()
		f.warn(at, "write "+a.String(), "%s is not in canonical form and is read as %s", quote(s), a)
		return a, true
	}
	f.refuse(at, "write an IPv4 or IPv6 address", "%s is not an IP address", quote(s))
	return netip.Addr{}, false
}

func appendAddr(addrs []netip.Addr, a netip.Addr) []netip.Addr {
	if slices.Contains(addrs, a) {
		return addrs
	}
	return append(addrs, a)
}

// intern makes equal strings share their storage: few namespaces, nodes and port names
// are named by many pods.
func intern(s string) string {
	if s == "" {
		return ""
	}
	return unique.Make(s).Value()
}
