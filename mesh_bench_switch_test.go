package main

import (
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
)

// tableSwitch makes tables of one namespace dormant and wakes them, in one transaction and without a process: a
// measurement does it every few milliseconds.
type tableSwitch struct {
	conn  *netlink.Conn
	awake string
}

func (n *meshBenchNode) switchTo(table string) error {
	if n.tables == nil {
		conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.ns})
		if err != nil {
			return fmt.Errorf("dial nfnetlink: %w", err)
		}
		n.tables = &tableSwitch{conn: conn, awake: nft.TableName}
	}
	return n.tables.wake(table)
}

func (s *tableSwitch) wake(table string) error {
	if table == s.awake {
		return nil
	}
	messages := []netlink.Message{batchMessage(unix.NFNL_MSG_BATCH_BEGIN)}
	for _, t := range []struct {
		name    string
		dormant byte
	}{{s.awake, unix.NFT_TABLE_F_DORMANT}, {table, 0}} {
		m, err := tableMessage(t.name, t.dormant)
		if err != nil {
			return err
		}
		messages = append(messages, m)
	}
	if _, err := s.conn.SendMessages(append(messages, batchMessage(unix.NFNL_MSG_BATCH_END))); err != nil {
		return fmt.Errorf("wake table %s: %w", table, err)
	}
	for range 2 {
		if _, err := s.conn.Receive(); err != nil {
			return fmt.Errorf("wake table %s: %w", table, err)
		}
	}
	s.awake = table
	return nil
}

// batchMessage names the subsystem in its last two bytes (struct nfgenmsg, res_id).
func batchMessage(kind netlink.HeaderType) netlink.Message {
	return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request}, Data: []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}}
}

func tableMessage(name string, flags byte) (netlink.Message, error) {
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(name), 0)}, {Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0, 0, 0, flags}}})
	return netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE, Flags: netlink.Request | netlink.Acknowledge},
		Data: append([]byte{unix.NFPROTO_INET, 0, 0, 0}, attributes...)}, err
}

// A meshPart is our table without some of its base chains.
type meshPart struct {
	table, what string
	without     []string
}

func meshParts() []meshPart {
	nat := []string{"delivery", "srcnat", "dstnat", "dstnat_own"}
	return []meshPart{
		{"part_guard", "all but the source guard", []string{"prerouting"}},
		{"part_nat", "all but the nat chains", nat},
		{"part_policy", "policy only", append([]string{"prerouting"}, nat...)},
		{"part_policy_nat", "policy and the nat chains", []string{"prerouting"}},
		{"part_nothing", "nothing in forward, prerouting or nat", append([]string{"prerouting", "forward"}, nat...)},
	}
}

// parts prints what a packet of a live connection costs with parts of our table, to see what the whole is made of:
// PARTS=1 scripts/bench-mesh.
func (w *meshBench) parts(name string, family int) {
	for _, n := range w.nodes {
		n.do(func() error {
			text, err := exec.Command("nft", "list", "table", "inet", nft.TableName).Output()
			if err != nil {
				return fmt.Errorf("list the table: %w", err)
			}
			for _, p := range meshParts() {
				n.nft("add table inet " + p.table + "\ndelete table inet " + p.table + "\n" + p.cut(string(text)))
			}
			return nil
		})
	}
	cost, stop := w.flow(family)
	defer stop()
	ratios := map[string][]float64{}
	for range meshRounds * meshBursts / 3 {
		w.useTable(floorTable, family)
		before := cost()
		for _, p := range append(meshParts(), meshPart{table: nft.TableName}) {
			w.useTable(p.table, family)
			ours := cost()
			w.useTable(floorTable, family)
			after := cost()
			ratios[p.table] = append(ratios[p.table], 2*ours/(before+after))
			before = after
		}
	}
	w.use(true, family)
	for _, p := range append(meshParts(), meshPart{table: nft.TableName, what: "everything"}) {
		list := slices.Sorted(slices.Values(ratios[p.table]))
		fmt.Printf("| %s | %s | established: %s | | | **%.3f** | (middle half %.3f to %.3f) | |\n", w.mode, name, p.what, medianOf(list), list[len(list)/4], list[len(list)*3/4])
	}
}

// cut takes base chains out of a listing and gives the table another name.
func (p meshPart) cut(listing string) string {
	s := strings.Replace(listing, "table inet "+nft.TableName+" {", "table inet "+p.table+" {\n\tflags dormant", 1)
	for _, chain := range p.without {
		s = regexp.MustCompile(`(?s)\tchain `+chain+` \{\n.*?\n\t\}\n`).ReplaceAllString(s, "")
	}
	return s
}
