package agent

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/nftcni/nftcni/cni"
)

// Network says who wires pods.
type Network string

// Modes of Config.Network.
const (
	// NetworkRouted: this plugin wires pods; only attached pods are local.
	NetworkRouted Network = "routed"
	// NetworkNone: another CNI wires pods; local pods are those the source places on
	// this node, their addresses come from the source, and there is no source guard.
	NetworkNone Network = "none"
)

// Config is the agent's configuration file (YAML). The zero value of every field works.
type Config struct {
	// Node is this node's name in the source; default: the host name in lower case.
	Node string `json:"node,omitempty"`
	// Network is "routed" (default) or "none".
	Network Network `json:"network,omitempty"`
	// RunDir holds the socket, the lock and the attachments; default /run/nftcni.
	RunDir string `json:"runDir,omitempty"`
	// StateDir holds the leases; default /var/lib/nftcni.
	StateDir string `json:"stateDir,omitempty"`
	// PodCIDRs of this node, for IPAM without ranges; default: Node.spec.podCIDRs.
	PodCIDRs []netip.Prefix `json:"podCIDRs,omitempty"`
	// ClusterCIDRs are the networks of all pods of the cluster, where known: never
	// masqueraded, and unreachable as long as no Node has them.
	ClusterCIDRs []netip.Prefix `json:"clusterCIDRs,omitempty"`
	// NonMasqueradeCIDRs are further destinations that see a pod's own address.
	NonMasqueradeCIDRs []netip.Prefix `json:"nonMasqueradeCIDRs,omitempty"`
	// PodToHost is "allow" (default) or "deny": deny closes the node's own addresses to its
	// pods, except DNS (port 53), answers to the node's connections and PodToHostPorts.
	PodToHost string `json:"podToHost,omitempty"`
	// PodToHostPorts stay open with deny, as tcp/10250; other than with deny they mean nothing.
	PodToHostPorts []string `json:"podToHostPorts,omitempty"`
	// MTU of pods; default: the plugin takes the uplink's.
	MTU int `json:"mtu,omitempty"`
	// Mesh is how pods of this node reach those of others.
	Mesh MeshConfig `json:"mesh,omitzero"`
	// PodWait bounds how long an attachment waits until the source knows its pod; it is
	// used with an API server only. Default 10s.
	PodWait Duration `json:"podWait,omitempty"`
	// OwnTable holds the table with flags owner,persist where the kernel has them
	// (6.9 and newer), so that a foreign flush skips it. Default true.
	OwnTable *bool `json:"ownTable,omitempty"`
	// LogLevel is debug, info (default), warn or error. LogFormat is text (default) or json.
	LogLevel  string `json:"logLevel,omitempty"`
	LogFormat string `json:"logFormat,omitempty"`
	// Metrics is the address that serves /metrics, /healthz and /readyz, as
	// "127.0.0.1:9100"; empty (default): none.
	Metrics string `json:"metrics,omitempty"`
	// FlowLog is a file that new connections are written to as JSON lines, rotated at
	// 64 MiB with two older files kept; empty (default): none.
	FlowLog string `json:"flowLog,omitempty"`
}

// Duration is a time.Duration written like "10s".
type Duration time.Duration

// UnmarshalText reads time.ParseDuration's form.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

// MarshalText writes time.Duration.String's form.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// LoadConfig reads path; an empty path is the default configuration. Unknown fields and
// values out of range are errors that name the field and what it takes.
func LoadConfig(path string) (Config, error) {
	var c Config
	if path != "" {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return c, fmt.Errorf("config %s does not exist: give another --config, or none for the defaults", path)
		}
		if err != nil {
			return c, fmt.Errorf("read config: %w", err)
		}
		if err := yaml.UnmarshalStrict(b, &c); err != nil {
			return c, fmt.Errorf("config %s: %w", path, err)
		}
	}
	return c.withDefaults()
}

func (c Config) withDefaults() (Config, error) {
	if c.Node == "" {
		host, err := os.Hostname()
		if err != nil {
			return c, fmt.Errorf("config field node is empty and the host has no name: %w", err)
		}
		c.Node = strings.ToLower(host) // as the kubelet does
	}
	own := true
	c.Network = cmp.Or(c.Network, NetworkRouted)
	c.RunDir = cmp.Or(c.RunDir, cni.DefaultRunDir)
	c.StateDir = cmp.Or(c.StateDir, cni.DefaultStateDir)
	c.PodWait = cmp.Or(c.PodWait, Duration(10*time.Second))
	c.OwnTable = cmp.Or(c.OwnTable, &own)
	c.PodToHost = cmp.Or(c.PodToHost, PodToHostAllow)
	c.LogLevel = cmp.Or(c.LogLevel, "info")
	c.LogFormat = cmp.Or(c.LogFormat, "text")
	return c, c.validate()
}

func (c Config) validate() error {
	if c.Network != NetworkRouted && c.Network != NetworkNone {
		return fmt.Errorf("config field network is %q: it takes routed or none", c.Network)
	}
	for field, dir := range map[string]string{"runDir": c.RunDir, "stateDir": c.StateDir} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("config field %s is %q: it takes an absolute path", field, dir)
		}
	}
	if c.MTU != 0 && (c.MTU < 1280 || c.MTU > 65535) {
		return fmt.Errorf("config field mtu is %d: it takes 0 or 1280 to 65535 (IPv6 needs 1280)", c.MTU)
	}
	if c.PodWait < 0 || time.Duration(c.PodWait) > 2*time.Minute {
		return fmt.Errorf("config field podWait is %v: it takes 0s to 2m", time.Duration(c.PodWait))
	}
	if _, _, err := net.SplitHostPort(c.Metrics); c.Metrics != "" && err != nil {
		return fmt.Errorf("config field metrics is %q: it takes an address with a port, as 127.0.0.1:9100", c.Metrics)
	}
	if c.FlowLog != "" && !filepath.IsAbs(c.FlowLog) {
		return fmt.Errorf("config field flowLog is %q: it takes an absolute path", c.FlowLog)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return fmt.Errorf("config field logFormat is %q: it takes text or json", c.LogFormat)
	}
	if _, err := c.logLevel(); err != nil {
		return err
	}
	_, err := c.podToHost()
	return err
}

// notMasqueraded are the configured destinations that see a pod's own address; the
// inventory adds those of the Nodes and of the attachments.
func (c Config) notMasqueraded() []netip.Prefix {
	return slices.Concat(c.PodCIDRs, c.ClusterCIDRs, c.NonMasqueradeCIDRs)
}

func (c Config) logLevel() (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return l, fmt.Errorf("config field logLevel is %q: it takes debug, info, warn or error", c.LogLevel)
	}
	return l, nil
}

// Logger writes structured lines to w as the configuration says.
func (c Config) Logger(w *os.File) *slog.Logger {
	level, err := c.logLevel()
	if err != nil {
		level = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// Socket is the path of the local API.
func (c Config) Socket() string { return filepath.Join(c.RunDir, cni.SocketName) }
