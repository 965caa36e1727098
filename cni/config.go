package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/nftcni/nftcni/ipam"
)

// maxConfig bounds the network configuration, in bytes.
const maxConfig = 1 << 20

// BuiltinIPAM is the name of our own IPAM plugin: as ipam.type it means that no other
// program is run.
const BuiltinIPAM = "nftcni-ipam"

// netConf is the network configuration as JSON. Fields that are not known are left alone.
type netConf struct {
	CNIVersion   string            `json:"cniVersion"`
	Name         string            `json:"name"`
	Type         string            `json:"type"`
	IPMasq       bool              `json:"ipMasq"`
	MTU          int               `json:"mtu"`
	RunDir       string            `json:"runDir"`
	StateDir     string            `json:"stateDir"`
	DNS          types.DNS         `json:"dns"`
	Sysctl       map[string]string `json:"sysctl"`
	Capabilities map[string]bool   `json:"capabilities"`
	IPAM         ipamConf          `json:"ipam"`
	PrevResult   json.RawMessage   `json:"prevResult"`
	Args         struct {
		CNI struct {
			Labels []struct {
				Key   string `json:"key"`
				Value string `json:"value"`
			} `json:"labels"`
			IPs []string `json:"ips"`
		} `json:"cni"`
	} `json:"args"`
	RuntimeConfig struct {
		MAC          string            `json:"mac"`
		IPs          []string          `json:"ips"`
		DNS          *types.DNS        `json:"dns"`
		PortMappings []json.RawMessage `json:"portMappings"`
		Bandwidth    *bandwidth        `json:"bandwidth"`
	} `json:"runtimeConfig"`
	ValidAttachments json.RawMessage `json:"cni.dev/valid-attachments"`
}

// config is a network configuration that was checked.
type config struct {
	netConf
	raw        []byte
	pools      []ipam.Pool // empty: the node's podCIDRs
	excludes   []netip.Prefix
	reserved   []netip.Addr
	routes     []netip.Prefix // empty: default routes
	wanted     []netip.Addr
	mac        net.HardwareAddr // nil: derived from the attachment's key
	labels     map[string]string
	prevResult *current.Result
}

// delegated says whether addresses come from another IPAM plugin.
func (c *config) delegated() bool { return c.IPAM.Type != "" && c.IPAM.Type != BuiltinIPAM }

// parseConfig reads and checks a network configuration. Errors are of code 6 when it is
// not JSON and of code 7 when a value in it cannot be used.
func parseConfig(raw []byte) (*config, error) {
	c := &config{raw: raw}
	if len(raw) > maxConfig {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration is longer than %d bytes", maxConfig), "")
	}
	if err := json.Unmarshal(raw, &c.netConf); err != nil {
		var kind *json.UnmarshalTypeError
		if errors.As(err, &kind) && kind.Field != "" {
			return nil, wrong("%s: got a JSON %s, want %s", kind.Field, kind.Value, jsonKind(kind.Type.Kind().String()))
		}
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration is not valid JSON: %v", err), "")
	}
	for _, check := range []func() error{c.checkNames, c.checkLink, c.checkRuntime, c.checkIPAM, c.readPrevResult} {
		if err := check(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func jsonKind(goKind string) string {
	switch goKind {
	case "slice":
		return "a list"
	case "struct", "map":
		return "an object"
	case "bool":
		return "true or false"
	case "string":
		return "a string"
	default:
		return "a whole number"
	}
}

func (c *config) checkNames() error {
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // what the specification says a configuration without it means
	}
	if err := new(version.Reconciler).Check(c.CNIVersion, supported()); err != nil {
		return types.NewError(types.ErrIncompatibleCNIVersion, "cniVersion: "+err.Error(), err.Details())
	}
	if c.Name == "" {
		return wrong("name: is missing; give the network a name")
	}
	if err := utils.ValidateNetworkName(c.Name); err != nil {
		return wrong("name: %v", err)
	}
	for _, d := range []struct {
		field    string
		value    *string
		fallback string
	}{{"runDir", &c.RunDir, DefaultRunDir}, {"stateDir", &c.StateDir, DefaultStateDir}} {
		if *d.value == "" {
			*d.value = d.fallback
		}
		if !filepath.IsAbs(*d.value) || strings.ContainsRune(*d.value, 0) {
			return wrong("%s: %q is not an absolute path", d.field, *d.value)
		}
	}
	return nil
}

// The smallest MTUs: RFC 791 for IPv4, RFC 8200 section 5 for IPv6.
const (
	minMTU4 = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

func (c *config) checkLink() error {
	if c.MTU != 0 && (c.MTU < minMTU4 || c.MTU > maxMTU) {
		return wrong("mtu: %d is not between %d and %d; leave it out to take the uplink's", c.MTU, minMTU4, maxMTU)
	}
	for key := range c.Sysctl {
		if _, err := sysctlPath(key, "eth0"); err != nil {
			return wrong("sysctl: %v", err)
		}
	}
	c.labels = map[string]string{}
	for i, l := range c.Args.CNI.Labels {
		if l.Key == "" {
			return wrong("args.cni.labels[%d].key: is empty; a label is {\"key\": ..., \"value\": ...}", i)
		}
		c.labels[l.Key] = l.Value
	}
	return nil
}

func (c *config) checkRuntime() error {
	r := c.RuntimeConfig
	if r.Bandwidth != nil {
		if err := r.Bandwidth.check(); err != nil {
			return err
		}
	}
	if r.MAC != "" {
		mac, err := net.ParseMAC(r.MAC)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			return wrong("runtimeConfig.mac: %q is not a unicast Ethernet address such as 02:00:00:00:00:01", r.MAC)
		}
		c.mac = mac
	}
	if r.DNS != nil {
		c.DNS = *r.DNS
	}
	asked := r.IPs
	if len(asked) == 0 {
		asked = c.Args.CNI.IPs
	}
	for i, s := range asked {
		a, err := parseAddrOrPrefix(s)
		if err != nil {
			return wrong("runtimeConfig.ips[%d]: %q is not an address such as 10.244.1.7 or 10.244.1.7/24", i, s)
		}
		c.wanted = append(c.wanted, a)
	}
	return nil
}

func parseAddrOrPrefix(s string) (netip.Addr, error) {
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		return p.Addr().Unmap(), err
	}
	a, err := netip.ParseAddr(s)
	if err == nil && a.Zone() != "" {
		err = errors.New("has a zone")
	}
	return a.Unmap(), err
}

// readPrevResult decodes the result of the plugins before us in a chain.
func (c *config) readPrevResult() error {
	if len(c.PrevResult) == 0 || bytes.Equal(c.PrevResult, []byte("null")) {
		return nil
	}
	res, err := version.NewResult(c.CNIVersion, c.PrevResult)
	if err != nil {
		return wrong("prevResult: is no result of version %s: %v", c.CNIVersion, err)
	}
	if c.prevResult, err = current.NewResultFromResult(res); err != nil {
		return wrong("prevResult: %v", err)
	}
	return nil
}

func supported() version.PluginInfo {
	return version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")
}
