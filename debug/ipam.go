package debug

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/ipam"
)

// LeaseRow is one lease with what became of its holder.
type LeaseRow struct {
	ipam.Lease
	// NetNSGone: the network namespace that held the address does not exist any more, so
	// the lease is left over; the next garbage collection or a full pool releases it.
	NetNSGone bool `json:"netnsGone,omitempty"`
}

func (s *session) ipamCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ipam",
		Short: "List the addresses that are leased on this node, and to whom",
		Long: "List the addresses that are leased on this node, and to whom.\n\n" +
			"It reads a copy of the lease file, changes nothing and needs no agent.",
		Example: "  nftcni debug ipam\n  nftcni debug ipam -o json | jq '.[] | select(.netnsGone)'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rows, err := s.leases(cmd.Context())
			if err != nil {
				return err
			}
			return s.print(cmd, rows, func(w io.Writer) error { return writeLeases(w, rows) })
		},
	}
}

func writeLeases(w io.Writer, rows []LeaseRow) error {
	t := &table{header: []string{"ADDRESS", "POD", "NETWORK", "INTERFACE", "CONTAINER", "SINCE", "NOTE"}}
	for _, r := range rows {
		state := "-"
		if r.NetNSGone {
			state = "its network namespace is gone"
		}
		t.add(r.Address.String(), orDash(r.Pod), r.Network, r.Interface, shortID(r.ContainerID), r.Since.UTC().Format(time.RFC3339), state)
	}
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "No address is leased.")
		return err
	}
	return t.write(w)
}

// shortID is a container ID as runtimes print it.
func shortID(id string) string {
	if len(id) == 64 {
		return id[:12]
	}
	return id
}

// leases reads a copy of the lease file, so that nothing it holds can be changed here.
func (s *session) leases(ctx context.Context) ([]LeaseRow, error) {
	dir, err := os.MkdirTemp("", "nftcni-leases-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for a copy of the leases: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := copyLeases(dir, s.stateDir); err != nil {
		return nil, err
	}
	var damage string
	store, err := ipam.New(ipam.Options{Dir: dir, Report: func(text string) { damage = text },
		Live: func(context.Context) ([]ipam.Lease, error) { return nil, nil }})
	if err != nil {
		return nil, err
	}
	list, err := store.Leases(ctx)
	if err == nil && damage != "" {
		err = fmt.Errorf("%s is damaged (%s): the next ADD sets it aside and rebuilds it from the pods that run", filepath.Join(s.stateDir, ipam.FileName), damage)
	}
	rows := []LeaseRow{}
	for _, l := range list {
		_, gone := os.Stat(l.NetNS)
		rows = append(rows, LeaseRow{Lease: l, NetNSGone: l.NetNS != "" && errors.Is(gone, fs.ErrNotExist)})
	}
	return rows, err
}

// copyLeases copies the lease file while no transaction runs on it. Without a file
// nothing is leased.
func copyLeases(to, stateDir string) error {
	if _, err := os.Stat(stateDir); err != nil {
		return fmt.Errorf("state directory: %w (name the agent's stateDir with --state-dir)", err)
	}
	if lock, err := os.Open(filepath.Join(stateDir, "leases.lock")); err == nil {
		defer func() { _ = lock.Close() }()
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_SH); err != nil {
			return fmt.Errorf("lock the leases: %w", err)
		}
	}
	data, err := os.ReadFile(filepath.Join(stateDir, ipam.FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read leases: %w", err)
	}
	return os.WriteFile(filepath.Join(to, ipam.FileName), data, 0o600)
}

// plural is "1 pod", "2 pods", "2 policies", "2 addresses".
func plural(n int, noun string) string {
	switch stem, y := strings.CutSuffix(noun, "y"); {
	case n == 1:
	case y:
		noun = stem + "ies"
	case strings.HasSuffix(noun, "s"):
		noun += "es"
	default:
		noun += "s"
	}
	return strconv.Itoa(n) + " " + noun
}
