package deploy

import (
	"embed"
	"fmt"
	"path/filepath"
)

//go:embed files
var files embed.FS

// Manifest is deploy/nftcni.yaml: everything that `kubectl apply` needs.
//
//go:embed nftcni.yaml
var Manifest []byte

func embedded(name string) []byte {
	b, err := files.ReadFile("files/" + name)
	if err != nil {
		panic(fmt.Sprintf("deploy: embedded file %s: %v", name, err))
	}
	return b
}

// Layout says where things are on a node. All paths are absolute and seen from the node;
// Root is put in front of each when files are touched, and appears in none of them.
type Layout struct {
	Root              string `json:"-"`
	BinDir            string `json:"binDir"`     // of CNI plugins; the binary itself is here
	ConfDir           string `json:"confDir"`    // of network configurations
	ConfigDir         string `json:"configDir"`  // of our own settings
	CommandDir        string `json:"commandDir"` // links for people
	SystemdDir        string `json:"systemdDir"`
	NetworkManagerDir string `json:"networkManagerDir"`
	SysctlDir         string `json:"sysctlDir"`
	StateDir          string `json:"stateDir"`
	RunDir            string `json:"runDir"`
}

// DefaultLayout is that of Debian, Ubuntu, Fedora and kubeadm.
func DefaultLayout() Layout {
	return Layout{
		BinDir: "/opt/cni/bin", ConfDir: "/etc/cni/net.d", ConfigDir: "/etc/nftcni", CommandDir: "/usr/local/bin",
		SystemdDir: "/etc/systemd", NetworkManagerDir: "/etc/NetworkManager/conf.d", SysctlDir: "/etc/sysctl.d",
		StateDir: "/var/lib/nftcni", RunDir: "/run/nftcni",
	}
}

// Validate refuses relative paths, by the name of the flag that sets them.
func (l Layout) Validate() error {
	if l.Root != "" && !filepath.IsAbs(l.Root) {
		return fmt.Errorf("--root is %q: it takes an absolute path", l.Root)
	}
	for flag, dir := range map[string]string{
		"--cni-bin-dir": l.BinDir, "--cni-conf-dir": l.ConfDir, "--config-dir": l.ConfigDir, "--command-dir": l.CommandDir,
		"--systemd-dir": l.SystemdDir, "--state-dir": l.StateDir, "--run-dir": l.RunDir,
	} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("%s is %q: it takes an absolute path", flag, dir)
		}
	}
	return nil
}

// in is where the node's path is for this process.
func (l Layout) in(path string) string { return filepath.Join(l.Root, path) }

// Binary is the one executable; every other name is a link to it.
func (l Layout) Binary() string { return filepath.Join(l.BinDir, "nftcni") }

// Config is the agent's configuration file.
func (l Layout) Config() string { return filepath.Join(l.ConfigDir, "agent.yaml") }

// Conflist is the network configuration that the agent copies to ConfDir when it serves.
func (l Layout) Conflist() string { return filepath.Join(l.ConfigDir, "nftcni.conflist") }

// record is where install writes the layout for uninstall.
func (l Layout) record() string { return filepath.Join(l.ConfigDir, "install.json") }

// links are the names by which the binary is called, and what each link holds.
func (l Layout) links() map[string]string {
	return map[string]string{
		filepath.Join(l.BinDir, "nftcni-ipam"):      "nftcni",
		filepath.Join(l.CommandDir, "nftcni"):       l.Binary(),
		filepath.Join(l.CommandDir, "nftcni-agent"): l.Binary(),
	}
}

// unit is the systemd unit; enabled is the link that starts it at boot.
func (l Layout) unit() string { return filepath.Join(l.SystemdDir, "system/nftcni-agent.service") }

func (l Layout) enabled() string {
	return filepath.Join(l.SystemdDir, "system/multi-user.target.wants/nftcni-agent.service")
}

// dropIns are the files for other network daemons, by their embedded name.
func (l Layout) dropIns() map[string]string {
	return map[string]string{
		"05-nftcni.network":             filepath.Join(l.SystemdDir, "network/05-nftcni.network"),
		"05-nftcni.link":                filepath.Join(l.SystemdDir, "network/05-nftcni.link"),
		"90-nftcni-networkd.conf":       filepath.Join(l.SystemdDir, "networkd.conf.d/90-nftcni.conf"),
		"90-nftcni-networkmanager.conf": filepath.Join(l.NetworkManagerDir, "90-nftcni.conf"),
		"90-nftcni-sysctl.conf":         filepath.Join(l.SysctlDir, "90-nftcni.conf"),
	}
}
