package agent

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/policy"
)

// Values of Config.PodToHost.
const (
	PodToHostAllow = "allow"
	PodToHostDeny  = "deny"
)

// dnsPort is open to pods of a closed node: a DNS server in the node's network namespace, or NodeLocal DNSCache.
const dnsPort = 53

// podToHost is what the configuration means for the table.
func (c Config) podToHost() (nft.PodToHost, error) {
	if c.PodToHost != PodToHostAllow && c.PodToHost != PodToHostDeny {
		return nft.PodToHost{}, fmt.Errorf("config field podToHost is %q: it takes allow or deny", c.PodToHost)
	}
	to := nft.PodToHost{Deny: c.PodToHost == PodToHostDeny, Open: []nft.ProtocolPort{{Protocol: policy.TCP, Port: dnsPort}, {Protocol: policy.UDP, Port: dnsPort}}}
	for i, s := range c.PodToHostPorts {
		protocol, number, _ := strings.Cut(s, "/")
		port, err := strconv.ParseUint(number, 10, 16)
		if hostPortProtocols[protocol] == 0 || err != nil || port == 0 {
			return nft.PodToHost{}, fmt.Errorf("config field podToHostPorts[%d] is %q: it takes tcp, udp or sctp and a port, as tcp/10250", i, s)
		}
		to.Open = append(to.Open, nft.ProtocolPort{Protocol: hostPortProtocols[protocol], Port: uint16(port)})
	}
	if to.Deny && c.Network == NetworkNone {
		return nft.PodToHost{}, fmt.Errorf("config field podToHost is deny with network none: which interfaces are pods' is not known then; " +
			"leave podToHost out, or use the other CNI's setting")
	}
	return to, nil
}

// changedPodToHost is what the configuration wants when the kernel holds something else; nil when it does not.
func (l *loop) changedPodToHost(have nft.PodToHost) *nft.PodToHost {
	want, err := l.cfg.podToHost()
	if err != nil || want.Equal(have) { // the configuration was checked when it was read
		return nil
	}
	return &want
}
