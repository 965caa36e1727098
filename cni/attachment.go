package cni

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/nftcni/nftcni/ipam"
)

const (
	attachmentDir = "attachments" // in the run directory
	hostPrefix    = "nft"
	hostDigits    = 12 // 15 characters are the kernel's limit
)

// maxRecord bounds an attachment's record, in bytes. It holds a network configuration
// when addresses come from another IPAM plugin.
const maxRecord = maxConfig + 1<<16

// HostInterface is the node's end of the veth of one attachment: "nft" and 12 hex digits
// that depend on nothing but the CNI key, so that DEL finds it without any record.
func HostInterface(containerID, ifname string) string {
	return hostPrefix + hex.EncodeToString(digest(containerID, ifname)[:hostDigits/2])
}

func digest(containerID, ifname string) []byte {
	sum := sha256.Sum256([]byte(containerID + "/" + ifname))
	return sum[:]
}

func isHostInterface(name string) bool {
	digits, ok := strings.CutPrefix(name, hostPrefix)
	return ok && len(digits) == hostDigits && strings.Trim(digits, "0123456789abcdef") == ""
}

// The MAC addresses of both ends are given, not left to the kernel: udev replaces random
// ones (MACAddressPolicy=persistent), and the permanent neighbour entries hold them. Both
// are locally administered (IEEE 802, second lowest bit of the first byte).
func hostMAC(containerID, ifname string) net.HardwareAddr { return mac(containerID, ifname, 8) }
func podMAC(containerID, ifname string) net.HardwareAddr  { return mac(containerID, ifname, 16) }

func mac(containerID, ifname string, at int) net.HardwareAddr {
	m := net.HardwareAddr(digest(containerID, ifname)[at : at+6])
	m[0] = m[0]&^1 | 2
	return m
}

// record is what RunDir/attachments/<HostInterface>.json holds: the attachment and what
// is needed to undo it without the runtime's help.
type record struct {
	Attachment
	// Pending is set from before the first link is made until the result is printed: such
	// a record whose lock is free belongs to a plugin that was killed.
	Pending bool `json:"pending,omitempty"`
	// Deleting is set when a DEL could not finish: the agent does what is left.
	Deleting bool `json:"deleting,omitempty"`

	MTU      int       `json:"mtu,omitempty"`
	HostMAC  string    `json:"hostMAC,omitempty"`
	PodMAC   string    `json:"podMAC,omitempty"`
	StateDir string    `json:"stateDir,omitempty"`
	Delegate *delegate `json:"delegate,omitempty"`
	// Bandwidth is what the runtime asked for; nil: no limit.
	Bandwidth *bandwidth `json:"bandwidth,omitempty"`
}

func (r record) owner() ipam.Owner {
	return ipam.Owner{Network: r.Network, ContainerID: r.ContainerID, Interface: r.Interface}
}

func recordPath(runDir, hostInterface string) string {
	return filepath.Join(runDir, attachmentDir, hostInterface+".json")
}

// writeRecord replaces the record in one step. The run directory is on tmpfs and the
// links it describes end with the boot, so nothing is synced.
func writeRecord(runDir string, r record) error {
	path, err := stageRecord(runDir, r)
	if err != nil {
		return err
	}
	if err := os.Rename(path, recordPath(runDir, r.HostInterface)); err != nil {
		return fmt.Errorf("write attachment %s: %w", r.HostInterface, err)
	}
	return nil
}

// stageRecord writes a record beside its place and returns the path to rename from.
func stageRecord(runDir string, r record) (string, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("encode attachment %s: %w", r.HostInterface, err)
	}
	path := recordPath(runDir, r.HostInterface) + ".tmp"
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return "", fmt.Errorf("write attachment %s: %w", r.HostInterface, errors.Join(err, ignoreMissing(os.Remove(path))))
	}
	return path, nil
}

// readRecord returns an error that matches fs.ErrNotExist when there is no record.
func readRecord(runDir, hostInterface string) (record, error) {
	path := recordPath(runDir, hostInterface)
	st, err := os.Stat(path)
	if err == nil && st.Size() > maxRecord {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxRecord)
	}
	if err != nil {
		return record{}, fmt.Errorf("read attachment: %w", err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return record{}, fmt.Errorf("read attachment: %w", err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("read attachment %s: %w", path, err)
	}
	if r.HostInterface != hostInterface || HostInterface(r.ContainerID, r.Interface) != hostInterface {
		return record{}, fmt.Errorf("read attachment %s: it describes another interface", path)
	}
	return r, nil
}

// RemoveAttachment removes the record of an attachment; one that is gone is no error.
func RemoveAttachment(runDir, hostInterface string) error {
	if !isHostInterface(hostInterface) {
		return fmt.Errorf("remove attachment: %q is not the name of a pod's interface", hostInterface)
	}
	path := recordPath(runDir, hostInterface)
	if err := errors.Join(ignoreMissing(os.Remove(path+".tmp")), ignoreMissing(os.Remove(path))); err != nil {
		return fmt.Errorf("remove attachment: %w", err)
	}
	return nil
}

// Attachments returns the attachments recorded in runDir, those in the making included,
// and an error for every record that cannot be read.
func Attachments(runDir string) ([]Attachment, []error) {
	records, errs := records(runDir)
	var list []Attachment
	for _, r := range records {
		if !r.Deleting {
			list = append(list, r.Attachment)
		}
	}
	return list, errs
}

func records(runDir string) ([]record, []error) {
	names, err := recordNames(runDir)
	if err != nil {
		return nil, []error{err}
	}
	var list []record
	var errs []error
	for _, name := range names {
		r, err := readRecord(runDir, name)
		switch {
		case errors.Is(err, fs.ErrNotExist): // deleted since
		case err != nil:
			errs = append(errs, err)
		default:
			list = append(list, r)
		}
	}
	return list, errs
}

// recordNames returns the host interfaces that have a record, in order.
func recordNames(runDir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(runDir, attachmentDir))
	if err := ignoreMissing(err); err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".json"); ok && isHostInterface(name) {
			names = append(names, name)
		}
	}
	return names, nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
