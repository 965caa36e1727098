package agent

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// maxHostPorts bounds what one attachment may ask for: both families of the plugin's limit.
const maxHostPorts = 1 << 13

var hostPortProtocols = map[string]policy.Protocol{"tcp": policy.TCP, "udp": policy.UDP, "sctp": policy.SCTP}

// checkHostPorts refuses what the plugin would not send: the record is a file, the request a message.
func checkHostPorts(a cni.Attachment) error {
	if len(a.HostPorts) > maxHostPorts {
		return fmt.Errorf("attach %s: %d host ports, want at most %d", a.HostInterface, len(a.HostPorts), maxHostPorts)
	}
	seen := map[cni.HostPort]bool{}
	for _, p := range a.HostPorts {
		host, pod := p.Host.Addr(), p.Pod.Addr()
		plain := host.IsValid() && host.Zone() == "" && !host.Is4In6() && host.Is4() == pod.Is4()
		once := cni.HostPort{Protocol: p.Protocol, Host: p.Host}
		if hostPortProtocols[p.Protocol] == 0 || !plain || p.Host.Port() == 0 || p.Pod.Port() == 0 || !slices.Contains(a.Addresses, pod) || seen[once] {
			return fmt.Errorf("attach %s: host port %.20q %s -> %s cannot lead to the pod, or stands twice", a.HostInterface, p.Protocol, p.Host, p.Pod)
		}
		seen[once] = true
	}
	return nil
}

// hostPorts of an attachment are none when its pod owns no address any more.
func (v *inventory) hostPorts(at *attachment) []nft.HostPort {
	if len(at.HostPorts) == 0 || len(v.bindings(at)) == 0 {
		return nil
	}
	out := make([]nft.HostPort, 0, len(at.HostPorts))
	for _, p := range at.HostPorts {
		out = append(out, nft.HostPort{Protocol: hostPortProtocols[p.Protocol], Addr: p.Host.Addr(), Port: p.Host.Port(), To: p.Pod,
			Comment: podName(at.Attachment).String()})
	}
	return out
}

// taken finds who has a host port that overlaps another.
type taken map[nft.ProtocolPort][]takenPort

type takenPort struct {
	nft.HostPort
	by *attachment
}

func (t taken) add(p nft.HostPort, by *attachment) {
	k := nft.ProtocolPort{Protocol: p.Protocol, Port: p.Port}
	t[k] = append(t[k], takenPort{p, by})
}

func (t taken) holder(p nft.HostPort) *attachment {
	for _, q := range t[nft.ProtocolPort{Protocol: p.Protocol, Port: p.Port}] {
		if p.Overlaps(q.HostPort) {
			return q.by
		}
	}
	return nil
}

// portHolder is the other attachment that has a host port that a asks for, nil when there is none.
func (v *inventory) portHolder(a cni.Attachment) (*attachment, nft.HostPort) {
	if len(a.HostPorts) == 0 {
		return nil, nft.HostPort{}
	}
	_, others := v.allHostPorts(a.HostInterface)
	for _, p := range v.hostPorts(&attachment{Attachment: a}) {
		if holder := others.holder(p); holder != nil {
			return holder, p
		}
	}
	return nil, nft.HostPort{}
}

// allHostPorts are those of every attachment but one, in the order of their interfaces. The first keeps a port that two
// want, which only records that somebody edited bring about.
func (v *inventory) allHostPorts(but string) ([]nft.HostPort, taken) {
	out, have := []nft.HostPort{}, taken{}
	for _, name := range slices.Sorted(maps.Keys(v.mapped)) {
		if name == but {
			continue
		}
		for _, p := range v.hostPorts(v.attached[name]) {
			if have.holder(p) == nil {
				have.add(p, v.attached[name])
				out = append(out, p)
			}
		}
	}
	return out, have
}

// changedHostPorts are the desired host ports when they differ from what the kernel holds; nil when they do not.
func (l *loop) changedHostPorts() []nft.HostPort {
	if len(l.inv.mapped) == 0 && len(l.mapped) == 0 {
		return nil
	}
	want := []nft.HostPort{}
	if l.cfg.Network == NetworkRouted {
		want, _ = l.inv.allHostPorts("")
	}
	if sameHostPorts(want, l.mapped) {
		return nil
	}
	l.mapped = want
	return want
}

// sameHostPorts ignores order and comments.
func sameHostPorts(a, b []nft.HostPort) bool {
	if len(a) != len(b) {
		return false
	}
	have := map[nft.HostPort]bool{}
	for _, p := range a {
		p.Comment = ""
		have[p] = true
	}
	return !slices.ContainsFunc(b, func(p nft.HostPort) bool { p.Comment = ""; return !have[p] })
}

// refusePort answers an attachment whose port another pod has.
func (w *attachWork) refusePort(holder *attachment, p nft.HostPort) {
	w.refuse(tryAgain("attach %s: host port %s %s is taken by pod %s (%s); give one of them another hostPort or hostIP, or delete that pod",
		podName(w.attachment), p.Protocol, netip.AddrPortFrom(p.Addr, p.Port), podName(holder.Attachment), holder.HostInterface))
}
