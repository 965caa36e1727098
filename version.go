package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
)

// Set by the linker (scripts/build): -X main.version=... -X main.commit=...
var version, commit string

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version, the kernel, and the nftables features found here",
		Example: "  nftcni version",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return writeVersion(cmd.Context(), cmd.OutOrStdout())
		},
	}
}

func writeVersion(ctx context.Context, w io.Writer) error {
	v, c := cmp.Or(version, "development"), commit
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				c = cmp.Or(c, s.Value)
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return fmt.Errorf("read the kernel's version: %w", err)
	}
	fmt.Fprintf(w, "nftcni   %s\ncommit   %s\ngo       %s %s/%s\nkernel   %s\n", v, cmp.Or(c, "unknown"),
		runtime.Version(), runtime.GOOS, runtime.GOARCH, unix.ByteSliceToString(u.Release[:]))
	for _, f := range nft.Features(ctx) {
		fmt.Fprintf(w, "%-8s %s: %s\n", "nftables", f.Name, f.State())
	}
	return nil
}
