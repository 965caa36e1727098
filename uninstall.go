package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/nftables"
	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/deploy"
	"github.com/nftcni/nftcni/nft"
)

func newUninstallCommand() *cobra.Command {
	l := deploy.DefaultLayout()
	var check, force bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take nftcni off this node: files, links, routes and the table",
		Long: "Take nftcni off this node: its network configuration first, then files, links, routes and the\n" +
			"table inet nftcni. Network configurations of others are put back.\n\n" +
			"Pods that still run on nftcni interfaces lose their network; drain the node first. --check\n" +
			"changes nothing, lists what is left and exits with 1 if that is anything.",
		Example: "  systemctl disable --now nftcni-agent && nftcni uninstall && nftcni uninstall --check",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			installed, err := deploy.InstalledLayout(l)
			if err != nil {
				return err
			}
			if check {
				return checkResidue(cmd.OutOrStdout(), installed)
			}
			return uninstall(cmd.Context(), cmd.OutOrStdout(), installed, force)
		},
	}
	f := cmd.Flags()
	layoutFlags(f, &l)
	f.BoolVar(&check, "check", false, "list what is left, change nothing")
	f.BoolVar(&force, "force", false, "although pods on this node are still attached")
	return cmd
}

func uninstall(ctx context.Context, out io.Writer, l deploy.Layout, force bool) error {
	runDir := filepath.Join(l.Root, l.RunDir)
	if err := refuseWhileServing(runDir); err != nil {
		return err
	}
	if list, _ := cni.Attachments(runDir); len(list) > 0 && !force {
		return fmt.Errorf("%d pod interfaces are still attached (first: %s/%s): drain the node first, or lose their network with --force",
			len(list), list[0].Namespace, list[0].Pod)
	}
	if l.Root == "" {
		if err := l.RestoreProxyARP("/proc/sys"); err != nil {
			return err
		}
	}
	steps, err := deploy.Uninstall(l)
	for _, s := range steps {
		fmt.Fprintln(out, s)
	}
	if l.Root != "" {
		return err // the files of another system; its kernel is not this one
	}
	return errors.Join(err, removeFromKernel(ctx, out))
}

// removeFromKernel removes links and routes before the table: until the last interface is
// gone, policy is in force.
func removeFromKernel(ctx context.Context, out io.Writer) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	left, err := cni.FindLeftovers(h)
	if err != nil {
		return err
	}
	if err := left.Remove(h); err != nil {
		return err
	}
	for _, s := range left.Strings() {
		fmt.Fprintf(out, "%-12s %s\n", "removed", s)
	}
	found, err := tableExists()
	if err != nil || !found {
		return err
	}
	if err := nft.Delete(ctx, nft.Options{}); err != nil {
		return fmt.Errorf("remove table inet nftcni: %w", err)
	}
	fmt.Fprintf(out, "%-12s %s\n", "removed", "table inet nftcni")
	return nil
}

func tableExists() (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open netfilter: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	for _, t := range tables {
		if t.Name == "nftcni" {
			return true, nil
		}
	}
	return false, nil
}

// refuseWhileServing returns an error while an agent holds the run directory: it would
// make again what is removed.
func refuseWhileServing(runDir string) error {
	f, err := os.Open(filepath.Join(runDir, "agent.lock"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the agent's lock: %w", err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return errors.New("the agent still runs on this node: stop it first (systemctl disable --now nftcni-agent, " +
			"or kubectl -n kube-system delete daemonset nftcni)")
	}
	return nil
}

func checkResidue(out io.Writer, l deploy.Layout) error {
	left := deploy.Residue(l)
	if l.Root == "" {
		kernel, err := kernelResidue()
		if err != nil {
			return err
		}
		left = append(left, kernel...)
	}
	for _, s := range left {
		fmt.Fprintln(out, s)
	}
	if len(left) > 0 {
		return fmt.Errorf("%d left: run nftcni uninstall", len(left))
	}
	fmt.Fprintln(out, "clean: nothing of nftcni is left on this node")
	return nil
}

func kernelResidue() ([]string, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	left, err := cni.FindLeftovers(h)
	if err != nil {
		return nil, err
	}
	out := left.Strings()
	found, err := tableExists()
	if found {
		out = append(out, "table inet nftcni")
	}
	return out, err
}
