package deploy

import (
	"encoding/json"
	"os"
	"slices"
)

// OtherNetwork is what install needs to know of a network of another plugin.
type OtherNetwork struct {
	Name    string
	Plugin  string // its first plugin
	Bridge  string // the bridge of the node that its pods are ports of, or ""
	IPAM    string // type of its address management; "" where the plugin chooses
	DataDir string // of host-local, where it is not /var/lib/cni/networks
}

// OtherNetworks are those of the configurations in ConfDir, in place or moved aside, by file
// name. What cannot be read is left out.
func (l Layout) OtherNetworks() []OtherNetwork {
	var out []OtherNetwork
	for _, path := range slices.Concat(othersConflists(l.in(l.ConfDir)), disabledConflists(l.in(l.ConfDir))) {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if n, ok := otherNetwork(b); ok {
			out = append(out, n)
		}
	}
	return out
}

// otherPlugin is a plugin's part of a configuration. flannel hands its delegate to the bridge plugin.
type otherPlugin struct {
	Type     string `json:"type"`
	Bridge   string `json:"bridge"`
	Delegate struct {
		Type   string `json:"type"`
		Bridge string `json:"bridge"`
	} `json:"delegate"`
	IPAM struct {
		Type    string `json:"type"`
		DataDir string `json:"dataDir"`
	} `json:"ipam"`
}

func otherNetwork(content []byte) (OtherNetwork, bool) {
	var list struct {
		Name string `json:"name"`
		otherPlugin
		Plugins []otherPlugin `json:"plugins"`
	}
	if json.Unmarshal(content, &list) != nil {
		return OtherNetwork{}, false
	}
	p := list.otherPlugin
	if len(list.Plugins) > 0 {
		p = list.Plugins[0]
	}
	n := OtherNetwork{Name: list.Name, Plugin: p.Type, IPAM: p.IPAM.Type, DataDir: p.IPAM.DataDir}
	switch {
	case p.Type == "bridge":
		n.Bridge = orName(p.Bridge, "cni0")
	case p.Type == "flannel" && (p.Delegate.Type == "" || p.Delegate.Type == "bridge"):
		n.Bridge = orName(p.Delegate.Bridge, "cni0")
	}
	return n, n.Plugin != ""
}

func orName(name, otherwise string) string {
	if name == "" {
		return otherwise
	}
	return name
}
