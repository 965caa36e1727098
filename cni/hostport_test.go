package cni

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
)

func TestHostPorts(t *testing.T) {
	both := []string{"10.22.0.7", "fd00:22::7"}
	for _, tt := range []struct {
		name, mappings string
		addresses      []string
		ports          []string // "protocol host pod"
		want           string   // of the error
	}{
		{name: "none", mappings: `[]`, addresses: both},
		{name: "both families", mappings: `[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]`, addresses: both,
			ports: []string{"tcp 0.0.0.0:8080 10.22.0.7:80", "tcp [::]:8080 [fd00:22::7]:80"}},
		{name: "protocol left out, as an upper-case word", mappings: `[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":2,"protocol":"UDP"}]`, addresses: both[:1],
			ports: []string{"tcp 0.0.0.0:1 10.22.0.7:2", "udp 0.0.0.0:1 10.22.0.7:2"}},
		{name: "one family of the pod", mappings: `[{"hostPort":53,"containerPort":53,"protocol":"sctp"}]`, addresses: both[1:], ports: []string{"sctp [::]:53 [fd00:22::7]:53"}},
		{name: "one family of the node", mappings: `[{"hostPort":8080,"containerPort":80,"hostIP":"0.0.0.0"}]`, addresses: both, ports: []string{"tcp 0.0.0.0:8080 10.22.0.7:80"}},
		{name: "an address, mapped", mappings: `[{"hostPort":8080,"containerPort":80,"hostIP":"::ffff:192.0.2.1"}]`, addresses: both, ports: []string{"tcp 192.0.2.1:8080 10.22.0.7:80"}},
		{name: "loopback", mappings: `[{"hostPort":8080,"containerPort":80,"hostIP":"127.0.0.1"}]`, addresses: both, ports: []string{"tcp 127.0.0.1:8080 10.22.0.7:80"}},
		{name: "no host port asked for", mappings: `[{"hostPort":0,"containerPort":80}]`, addresses: both},
		{name: "the same twice", mappings: `[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":2}]`, addresses: both[:1], ports: []string{"tcp 0.0.0.0:1 10.22.0.7:2"}},
		{name: "one to two ports", mappings: `[{"hostPort":1,"containerPort":2},{"hostPort":1,"containerPort":3}]`, addresses: both[:1], want: "portMappings[1]: tcp port 0.0.0.0:1 of the node leads to container port 2 already"},
		{name: "host port range", mappings: `[{"hostPort":65536,"containerPort":80}]`, addresses: both, want: "portMappings[0].hostPort: 65536 is not between 1 and 65535"},
		{name: "negative", mappings: `[{"hostPort":-1,"containerPort":80}]`, addresses: both, want: "portMappings[0].hostPort: -1"},
		{name: "container port missing", mappings: `[{"hostPort":80}]`, addresses: both, want: "portMappings[0].containerPort: 0 is not between"},
		{name: "protocol", mappings: `[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]`, addresses: both, want: `portMappings[0].protocol: "icmp" is not tcp, udp or sctp`},
		{name: "host IP", mappings: `[{"hostPort":80,"containerPort":80,"hostIP":"eth0"}]`, addresses: both, want: `portMappings[0].hostIP: "eth0" is not an address`},
		{name: "zone", mappings: `[{"hostPort":80,"containerPort":80,"hostIP":"fe80::1%eth0"}]`, addresses: both, want: "portMappings[0].hostIP"},
		{name: "multicast", mappings: `[{"hostPort":80,"containerPort":80,"hostIP":"224.0.0.1"}]`, addresses: both, want: "portMappings[0].hostIP"},
		{name: "loopback of IPv6", mappings: `[{"hostPort":80,"containerPort":80,"hostIP":"::1"}]`, addresses: both, want: "nothing from ::1"},
		{name: "family the pod has not", mappings: `[{"hostPort":80,"containerPort":80,"hostIP":"2001:db8::1"}]`, addresses: both[:1], want: "portMappings[0].hostIP: 2001:db8::1 is of a family"},
		{name: "kind", mappings: `[{"hostPort":"80","containerPort":80}]`, addresses: both, want: "portMappings[0]: is not {"},
		{name: "no object", mappings: `[7]`, addresses: both, want: "portMappings[0]: is not {"},
		{name: "too many", mappings: "[" + strings.Repeat("{},", maxPortMappings) + "{}]", addresses: both, want: "portMappings: 4097 entries"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := parseConfig([]byte(`{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"portMappings":` + tt.mappings + `}}`))
			if err != nil {
				t.Fatal(err)
			}
			var addresses []netip.Addr
			for _, a := range tt.addresses {
				addresses = append(addresses, netip.MustParseAddr(a))
			}
			ports, err := c.hostPorts(addresses)
			if tt.want != "" {
				if asCNI(err).Code != 7 || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want code 7 and %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range ports {
				got = append(got, p.Protocol+" "+p.Host.String()+" "+p.Pod.String())
			}
			if !slices.Equal(got, tt.ports) {
				t.Errorf("got %q, want %q", got, tt.ports)
			}
		})
	}
}

// TestKernelHostPortRecord: ADD asks the agent for what the runtime asked for and keeps it on record; the pod's interface
// lets the node's loopback through only where a port needs it; CHECK, DEL and a refused ADD know all of it.
func TestKernelHostPortRecord(t *testing.T) {
	n := newNode(t)
	l := n.list("1.0.0", `{"capabilities": {"portMappings": true}, `+dualStack[1:])
	for _, tt := range []struct {
		name, hostIP, localnet string
		ports                  int
	}{{"every address", "", "1", 2}, {"one address", "192.0.2.1", "0", 1}, {"loopback", "127.0.0.1", "1", 1}} {
		t.Run(tt.name, func(t *testing.T) {
			before := n.snapshot()
			rt := n.runtime("a", n.pod("a"))
			defer n.kill("a")
			rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": tt.hostIP}}}
			n.mustAdd(l, rt)
			host := HostInterface("a", "eth0")
			record, err := readRecord(n.run, host)
			if err != nil {
				t.Fatal(err)
			}
			if asked := n.agent.attached[host].HostPorts; len(asked) != tt.ports || !slices.Equal(asked, record.HostPorts) {
				t.Errorf("the agent was asked for %v, on record are %v; want %d", asked, record.HostPorts, tt.ports)
			}
			path := "/proc/sys/net/ipv4/conf/" + host + "/route_localnet"
			if b, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(b)) != tt.localnet {
				t.Errorf("route_localnet %q, %v; want %s", b, err, tt.localnet)
			}
			if err := n.cni.CheckNetworkList(t.Context(), l, rt); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if tt.localnet == "1" {
				if err := os.WriteFile(path, []byte("0"), 0o644); err != nil {
					t.Fatal(err)
				}
				if err := n.cni.CheckNetworkList(t.Context(), l, rt); err == nil || !strings.Contains(err.Error(), "route_localnet is 0, want 1") {
					t.Errorf("CHECK without route_localnet: %v", err)
				}
			}
			rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{{"hostPort": -1}}}
			n.mustDel(l, rt) // whatever it says
			n.same("ADD and DEL", before)
		})
	}
}
