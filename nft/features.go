package nft

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
)

// Feature is something of nf_tables that this program uses where it is there.
type Feature struct {
	Name   string // with the kernel version it came with
	Err    error  // nil: there; otherwise why not, or why it could not be told
	Denied bool   // it could not be told: CAP_NET_ADMIN is missing
}

// State is the feature's answer on one line.
func (f Feature) State() string {
	switch {
	case f.Err == nil:
		return "yes"
	case f.Denied:
		return "unknown (needs CAP_NET_ADMIN)"
	}
	return "no (" + f.Err.Error() + ")"
}

// probeTable is made and deleted in one transaction.
const probeTable = "nftcni_probe"

// Features tries what the program needs in the caller's network namespace. Each probe is
// one transaction that makes a table and deletes it again, so that nothing is left.
func Features(ctx context.Context) []Feature {
	return []Feature{
		probe(ctx, "tables of family inet (Linux 3.14)", 0),
		probe(ctx, "table flags owner,persist (Linux 6.9)", tableOwner|tablePersist),
	}
}

func probe(ctx context.Context, name string, flags uint32) Feature {
	err := tryTable(ctx, flags)
	return Feature{Name: name, Err: err, Denied: errors.Is(err, unix.EPERM)}
}

func tryTable(ctx context.Context, flags uint32) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	c, err := dial(0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	b := newBatch(c.seq)
	b.change(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "add table "+probeTable)
	b.str(unix.NFTA_TABLE_NAME, probeTable)
	b.u32(unix.NFTA_TABLE_FLAGS, flags)
	b.endMessage()
	b.change(unix.NFT_MSG_DELTABLE, 0, "delete table "+probeTable)
	b.str(unix.NFTA_TABLE_NAME, probeTable)
	b.endMessage()
	return c.commit(b)
}
