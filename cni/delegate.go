package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// delegate is another IPAM plugin and what it was called with (CNI specification,
// section 4): kept with the attachment, so that its address can be given back when the
// runtime never calls DEL.
type delegate struct {
	Type string          `json:"type"`
	Path string          `json:"path"` // CNI_PATH
	Args string          `json:"args,omitempty"`
	Conf json.RawMessage `json:"conf"`
}

func (c *call) delegate() *delegate {
	return &delegate{Type: c.conf.IPAM.Type, Path: c.path, Args: c.rawArgs, Conf: c.conf.raw}
}

func (d *delegate) find() (string, error) {
	for _, dir := range filepath.SplitList(d.Path) {
		path := filepath.Join(dir, d.Type)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", wrong("ipam.type: plugin %s is not in CNI_PATH %q; install it or use %s", d.Type, d.Path, BuiltinIPAM)
}

// call calls the delegate and returns what it printed. We run it ourselves, because libcni's
// package for it brings OpenTelemetry and net/http with it (docs/decisions/0024).
func (d *delegate) call(ctx context.Context, command string, r record, stderr io.Writer) ([]byte, error) {
	path, err := d.find()
	if err != nil {
		return nil, err
	}
	var stdout bytes.Buffer
	c := exec.CommandContext(ctx, path)
	c.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+r.ContainerID, "CNI_NETNS="+r.NetNS,
		"CNI_IFNAME="+r.Interface, "CNI_PATH="+d.Path, "CNI_ARGS="+d.Args)
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(d.Conf), &stdout, stderr
	if err := c.Run(); err != nil {
		said := new(types.Error)
		if json.Unmarshal(stdout.Bytes(), said) == nil && said.Msg != "" {
			err = said
		}
		return nil, fmt.Errorf("ipam plugin %s %s: %w", d.Type, command, err)
	}
	return stdout.Bytes(), nil
}

// run calls a command that has no result.
func (d *delegate) run(ctx context.Context, command string, r record, stderr io.Writer) error {
	_, err := d.call(ctx, command, r, stderr)
	return err
}

// add asks the delegate for addresses.
func (d *delegate) add(ctx context.Context, r record, stderr io.Writer) (allocation, error) {
	out, err := d.call(ctx, "ADD", r, stderr)
	if err != nil {
		return allocation{}, err
	}
	got, err := readResult(d.Conf, out)
	if err != nil {
		return allocation{}, fmt.Errorf("ipam plugin %s: result: %w", d.Type, err)
	}
	return readAllocation(d.Type, got)
}

// readResult decodes a result; one that names no version has that of the configuration.
func readResult(conf, out []byte) (*current.Result, error) {
	var asked, given struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(conf, &asked); err != nil {
		return nil, fmt.Errorf("decode configuration: %w", err)
	}
	if err := json.Unmarshal(out, &given); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	if given.CNIVersion == "" {
		given.CNIVersion = asked.CNIVersion
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(out, &fields); err != nil {
			return nil, fmt.Errorf("decode: %w", err)
		}
		if fields == nil {
			fields = map[string]json.RawMessage{}
		}
		fields["cniVersion"] = fmt.Appendf(nil, "%q", asked.CNIVersion)
		var err error
		if out, err = json.Marshal(fields); err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
	}
	res, err := create.Create(given.CNIVersion, out)
	if err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	return current.NewResultFromResult(res)
}

func readAllocation(plugin string, got *current.Result) (allocation, error) {
	al := allocation{dns: got.DNS}
	for _, ip := range got.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		if !ok {
			return al, fmt.Errorf("ipam plugin %s: %q is not an address", plugin, ip.Address.String())
		}
		al.addresses = append(al.addresses, a.Unmap())
		if subnet, ok := prefixOf(ip.Address.IP, ip.Address.Mask); ok {
			al.pools = append(al.pools, subnet)
		}
	}
	if len(al.addresses) == 0 {
		return al, errors.New("ipam plugin " + plugin + ": gave no address")
	}
	for _, r := range got.Routes {
		if dst, ok := prefixOf(r.Dst.IP, r.Dst.Mask); ok {
			al.routes = append(al.routes, dst)
		}
	}
	return al, nil
}
