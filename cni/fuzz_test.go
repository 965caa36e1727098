package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// FuzzConfig reads network configurations: whatever comes in, the answer is a
// configuration that can be used, or an error with a code and a message.
func FuzzConfig(f *testing.F) {
	b, err := os.ReadFile("testdata/cni-network-configurations.json")
	if err != nil {
		f.Fatal(err)
	}
	var confs []json.RawMessage
	if err := json.Unmarshal(b, &confs); err != nil {
		f.Fatal(err)
	}
	for _, c := range confs {
		f.Add([]byte(c))
	}
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"n","ipam":{"ranges":[[{"subnet":"10.0.0.0/8","rangeStart":"10.0.0.9"}],[{"subnet":"fd00::/64"}]],"excludes":["10.0.0.0/24"],"reserved":["10.1.1.1"]},"sysctl":{"net.ipv4.ip_forward":"1"},"runtimeConfig":{"mac":"02:00:00:00:00:01","ips":["10.0.0.9/8"]},"prevResult":{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.1/24"}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := parseConfig(raw)
		if err != nil {
			if e := asCNI(err); e.Code == 0 || e.Code == types.ErrInternal || e.Msg == "" {
				t.Errorf("error without a code of the specification: %v", err)
			}
			return
		}
		for _, pool := range c.pools {
			for _, r := range pool {
				if r.Last.Less(r.First) || !r.Subnet.Contains(r.First) || !r.Subnet.Contains(r.Last) {
					t.Errorf("range %v of %v", r, r.Subnet)
				}
			}
		}
		for key := range c.Sysctl {
			if p, err := sysctlPath(key, "eth0"); err != nil || !strings.HasPrefix(p, "/proc/sys/net/") || p != filepath.Clean(p) {
				t.Errorf("sysctl %q is file %q, %v", key, p, err)
			}
		}
	})
}

// FuzzArgs reads CNI_ARGS.
func FuzzArgs(f *testing.F) {
	f.Add("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-1;K8S_POD_UID=123")
	f.Add("K8S_POD_NAME")
	f.Add(";;=;")
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseArgs(s)
		if err != nil && asCNI(err).Code != types.ErrInvalidEnvironmentVariables {
			t.Errorf("error %v", err)
		}
		if err != nil && a != (podArgs{}) {
			t.Errorf("values %v beside error %v", a, err)
		}
	})
}

// FuzzRecord reads attachment records: what is read can be written and read again.
func FuzzRecord(f *testing.F) {
	r := record{Attachment: Attachment{Network: "n", ContainerID: "a", Interface: "eth0", HostInterface: HostInterface("a", "eth0")}, MTU: 1500}
	b, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{`))
	f.Add([]byte(`{"hostInterface":"nft000000000000"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		run := t.TempDir()
		if err := os.Mkdir(filepath.Join(run, attachmentDir), 0o700); err != nil {
			t.Fatal(err)
		}
		name := HostInterface("a", "eth0")
		if err := os.WriteFile(recordPath(run, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(run, name)
		if err != nil {
			if _, errs := Attachments(run); len(errs) == 0 {
				t.Error("Attachments does not report the unreadable record")
			}
			return
		}
		if err := writeRecord(run, r); err != nil {
			t.Fatal(err)
		}
		if again, err := readRecord(run, name); err != nil || again.HostInterface != r.HostInterface || len(again.Addresses) != len(r.Addresses) {
			t.Errorf("read again: %+v, %v", again, err)
		}
	})
}

// FuzzAnswer has the client read what an agent, or somebody in its place, answers.
func FuzzAnswer(f *testing.F) {
	f.Add(200, []byte(`{"ready":true,"podCIDRs":["10.0.0.0/24"]}`))
	f.Add(409, []byte(`{"code":11,"message":"later"}`))
	f.Add(404, []byte("404 page not found"))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		if a, err := parseAnswer(body); err == nil && a.refusal().Message == "" {
			t.Error("a refusal without a message")
		}
		a, err := parseAnswer(fmt.Appendf(nil, "HTTP/1.0 %d Whatever\r\nDate: now\r\n\r\n%s", status, body))
		if err != nil || a.code != status || !bytes.Equal(a.body, body) || a.refusal().Message == "" {
			t.Errorf("answer %+v, %v", a, err)
		}
		var r Ready
		if json.NewDecoder(bytes.NewReader(body)).Decode(&r) == nil {
			if _, err := nodePools(r.PodCIDRs); err != nil && asCNI(err).Code != types.ErrInvalidNetworkConfig {
				t.Errorf("podCIDRs %v: %v", r.PodCIDRs, err)
			}
		}
	})
}

func TestParseConfig(t *testing.T) {
	for _, tt := range []struct {
		name, conf string
		code       uint
		want       string
	}{
		{name: "no JSON", conf: `{`, code: 6, want: "JSON"},
		{name: "no name", conf: `{"cniVersion":"1.0.0"}`, code: 7, want: "name:"},
		{name: "bad name", conf: `{"cniVersion":"1.0.0","name":"a/b"}`, code: 7, want: "name:"},
		{name: "no version", conf: `{"name":"n"}`, code: 1, want: "cniVersion"},
		{name: "old version", conf: `{"cniVersion":"0.2.0","name":"n"}`, code: 1, want: "cniVersion"},
		{name: "future version", conf: `{"cniVersion":"9.0.0","name":"n"}`, code: 1, want: "cniVersion"},
		{name: "unknown field", conf: `{"cniVersion":"1.0.0","name":"n","frobnicate":{"x":[1]}}`},
		{name: "mtu kind", conf: `{"cniVersion":"1.0.0","name":"n","mtu":"1500"}`, code: 7, want: "mtu: got a JSON string"},
		{name: "mtu range", conf: `{"cniVersion":"1.0.0","name":"n","mtu":12}`, code: 7, want: "mtu: 12"},
		{name: "runDir", conf: `{"cniVersion":"1.0.0","name":"n","runDir":"run"}`, code: 7, want: "runDir:"},
		{name: "stateDir", conf: `{"cniVersion":"1.0.0","name":"n","stateDir":"../x"}`, code: 7, want: "stateDir:"},
		{name: "dhcp", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"type":"dhcp"}}`, code: 7, want: "ipam.type: dhcp"},
		{name: "ipam type a path", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"type":"../../bin/sh"}}`, code: 7, want: "ipam.type"},
		{name: "subnet", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"subnet":"10.0.0.0"}}`, code: 7, want: "ipam.ranges[0][0].subnet"},
		{name: "rangeStart elsewhere", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"subnet":"10.0.0.0/24","rangeStart":"10.1.0.1"}}`, code: 7, want: "rangeStart: 10.1.0.1 is not in subnet"},
		{name: "rangeStart alone", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"rangeStart":"10.1.0.1"}}`, code: 7, want: "ipam.subnet: is missing"},
		{name: "mixed families", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"ranges":[[{"subnet":"10.0.0.0/24"},{"subnet":"fd00::/64"}]]}}`, code: 7, want: "mixes IPv4 and IPv6"},
		{name: "overlap", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"ranges":[[{"subnet":"10.0.0.0/24"},{"subnet":"10.0.0.0/25"}]]}}`, code: 7, want: "overlaps"},
		{name: "empty range list", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"ranges":[[]]}}`, code: 7, want: "ipam.ranges[0]: is empty"},
		{name: "exclude", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"subnet":"10.0.0.0/24","excludes":["x"]}}`, code: 7, want: "ipam.excludes[0]"},
		{name: "reserved", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"subnet":"10.0.0.0/24","reserved":["10.0.0.0/28"]}}`, code: 7, want: "ipam.reserved[0]"},
		{name: "route", conf: `{"cniVersion":"1.0.0","name":"n","ipam":{"routes":[{"dst":"default"}]}}`, code: 7, want: "ipam.routes[0].dst"},
		{name: "sysctl", conf: `{"cniVersion":"1.0.0","name":"n","sysctl":{"kernel.panic":"1"}}`, code: 7, want: "sysctl"},
		{name: "sysctl out of /proc/sys", conf: `{"cniVersion":"1.0.0","name":"n","sysctl":{"net/../../x":"1"}}`, code: 7, want: "sysctl"},
		{name: "multicast MAC", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"mac":"01:00:5e:00:00:01"}}`, code: 7, want: "runtimeConfig.mac"},
		{name: "ips", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"ips":["ten"]}}`, code: 7, want: "runtimeConfig.ips[0]"},
		{name: "portMappings", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"portMappings":[{"hostPort":1}]}}`},
		{name: "no portMappings", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"portMappings":[]}}`},
		{name: "bandwidth", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{"ingressRate":1000,"egressRate":1000000000000000,"egressBurst":1}}}`},
		{name: "no bandwidth", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{}}}`},
		{name: "low rate", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{"ingressRate":999}}}`, code: 7, want: "runtimeConfig.bandwidth.ingressRate: 999 bit/s"},
		{name: "high rate", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{"egressRate":1000000000000001}}}`, code: 7, want: "runtimeConfig.bandwidth.egressRate: 1000000000000001 bit/s"},
		{name: "burst alone", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{"egressBurst":1000}}}`, code: 7, want: "egressBurst: is set and egressRate is not"},
		{name: "negative rate", conf: `{"cniVersion":"1.0.0","name":"n","runtimeConfig":{"bandwidth":{"egressRate":-1}}}`, code: 7, want: "runtimeConfig.bandwidth.egressRate: got a JSON number -1, want a whole number"},
		{name: "prevResult", conf: `{"cniVersion":"1.0.0","name":"n","prevResult":{"cniVersion":"1.0.0","ips":[{"address":"x"}]}}`, code: 7, want: "prevResult"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := parseConfig([]byte(tt.conf))
			if tt.code == 0 {
				if err != nil {
					t.Errorf("got %v", err)
				}
				return
			}
			var e *types.Error
			if !errors.As(err, &e) || e.Code != tt.code || !strings.Contains(e.Error(), tt.want) {
				t.Errorf("got %v, want code %d with %q", err, tt.code, tt.want)
			}
		})
	}
}

func TestNames(t *testing.T) {
	name := HostInterface("0123456789abcdef", "eth0")
	if len(name) != 15 || !isHostInterface(name) || name == HostInterface("0123456789abcdef", "eth1") {
		t.Errorf("name %q", name)
	}
	for _, other := range []string{"", "nft", "nft12345678901", "nft1234567890123", "nft12345678901G", "nft12345678901A", "veth12345678901"} {
		if isHostInterface(other) {
			t.Errorf("%q counts as ours", other)
		}
	}
	for _, m := range []net.HardwareAddr{hostMAC("a", "eth0"), podMAC("a", "eth0")} {
		if m[0]&1 != 0 || m[0]&2 == 0 {
			t.Errorf("%s is not a local unicast address", m)
		}
	}
}

// TestPodNames: what a runtime says a pod is called reaches files, logs and terminals.
func TestPodNames(t *testing.T) {
	for _, args := range []string{"", "K8S_POD_NAME=web-1", "K8S_POD_NAMESPACE=a;K8S_POD_NAME=Web_1.b"} {
		if a, err := parseArgs(args); err != nil || a.check() != nil {
			t.Errorf("%q: %v, %v", args, err, a.check())
		}
	}
	for _, args := range []string{"K8S_POD_NAMESPACE=../..;K8S_POD_NAME=b", "K8S_POD_NAME=a/b", "K8S_POD_NAME=a\n\x1b[31mb", "K8S_POD_NAME=" + strings.Repeat("a", 254)} {
		if a, err := parseArgs(args); err != nil || a.check() == nil {
			t.Errorf("%q: %v, and it counts as a name", args, err)
		}
	}
}
