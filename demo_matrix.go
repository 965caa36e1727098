package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// Cells of a matrix.
const (
	cellAllowed = '+' // over every family that both ends have
	cellDenied  = '-'
	cellIPv4    = '4' // over IPv4 only
	cellIPv6    = '6'
	cellUnasked = '.'
	cellMixed   = '?' // seen only: the services of the block differ
)

// matrix says who may open a connection to whom, on which services.
type matrix struct {
	names  []string // rows and, in the same order, columns
	blocks []block
}

type block struct {
	services []service
	cells    [][]byte // [source][destination]
}

// clone copies a matrix that shares names and services with m.
func (m matrix) clone() matrix {
	c := matrix{names: m.names}
	for _, b := range m.blocks {
		cells := make([][]byte, len(b.cells))
		for i := range cells {
			cells[i] = bytes.Clone(b.cells[i])
		}
		c.blocks = append(c.blocks, block{b.services, cells})
	}
	return c
}

// services lists every service of every block once.
func (m matrix) services() []service {
	var all []service
	for _, b := range m.blocks {
		for _, s := range b.services {
			if !slices.Contains(all, s) {
				all = append(all, s)
			}
		}
	}
	return all
}

// parseService reads "tcp/80", "udp/53", "sctp/7" or "icmp".
func parseService(s string) (service, error) {
	if s == "icmp" {
		return echo, nil
	}
	name, port, _ := strings.Cut(s, "/")
	protocol, ok := map[string]policy.Protocol{"tcp": policy.TCP, "udp": policy.UDP, "sctp": policy.SCTP}[name]
	n, err := strconv.ParseUint(port, 10, 16)
	if !ok || err != nil || n == 0 {
		return service{}, fmt.Errorf("service %q: want tcp/PORT, udp/PORT, sctp/PORT or icmp", s)
	}
	return service{protocol, uint16(n)}, nil
}

// parseMatrix reads the format that testdata/demo/expected.txt describes.
func parseMatrix(text []byte) (matrix, error) {
	var m matrix
	var row int
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		if heading, ok := strings.CutSuffix(line, ":"); ok {
			b := block{}
			for _, f := range strings.Fields(heading) {
				s, err := parseService(f)
				if err != nil {
					return m, fmt.Errorf("line %d: %w", n, err)
				}
				b.services = append(b.services, s)
			}
			m.blocks, row = append(m.blocks, b), 0
			continue
		}
		if len(m.blocks) == 0 {
			return m, fmt.Errorf("line %d: a row before the first heading", n)
		}
		if err := m.addRow(row, line); err != nil {
			return m, fmt.Errorf("line %d: %w", n, err)
		}
		row++
	}
	for _, b := range m.blocks {
		if len(b.cells) != len(m.names) {
			return m, fmt.Errorf("block %s has %d rows, the first has %d", b.heading(), len(b.cells), len(m.names))
		}
		for i, r := range b.cells {
			if len(r) != len(m.names) {
				return m, fmt.Errorf("block %s, row %s has %d cells, want %d", b.heading(), m.names[i], len(r), len(m.names))
			}
		}
	}
	return m, lines.Err()
}

func (m *matrix) addRow(row int, line string) error {
	name, rest, _ := strings.Cut(line, " ")
	cells := []byte(strings.ReplaceAll(rest, " ", ""))
	if i := bytes.IndexFunc(cells, func(r rune) bool { return !strings.ContainsRune("+-46.", r) }); i >= 0 {
		return fmt.Errorf("row %s: cell %q: want + - 4 6 or a dot", name, cells[i])
	}
	if len(m.blocks) == 1 {
		m.names = append(m.names, name)
	} else if row >= len(m.names) || m.names[row] != name {
		return fmt.Errorf("row %s: the rows of every block are those of the first, in their order", name)
	}
	b := &m.blocks[len(m.blocks)-1]
	b.cells = append(b.cells, cells)
	return nil
}

func (b block) heading() string {
	names := make([]string, len(b.services))
	for i, s := range b.services {
		names[i] = s.String()
	}
	return strings.Join(names, " ")
}

// probes asks what m has a cell for, over every family that both ends have.
func (m matrix) probes(ends []*endpoint) []*probe {
	var all []*probe
	for _, b := range m.blocks {
		for i, row := range b.cells {
			for j, cell := range row {
				if cell == cellUnasked {
					continue
				}
				for _, s := range b.services {
					for _, pair := range ends[i].families(ends[j]) {
						all = append(all, &probe{src: ends[i], dst: ends[j], from: pair[0], to: pair[1], service: s})
					}
				}
			}
		}
	}
	return all
}

// expects tells whether m allows the probe.
func (m matrix) expects(p *probe) bool {
	i, j := slices.Index(m.names, p.src.name), slices.Index(m.names, p.dst.name)
	for _, b := range m.blocks {
		if slices.Contains(b.services, p.service) {
			c := b.cells[i][j]
			return c == cellAllowed || c == cellIPv4 && p.to.Is4() || c == cellIPv6 && p.to.Is6()
		}
	}
	return false
}

// seen draws the outcome of the probes in the shape of m.
func (m matrix) seen(probes []*probe) matrix {
	type key struct {
		src, dst string
		service  service
	}
	answers := make(map[key][]*probe)
	for _, p := range probes {
		k := key{p.src.name, p.dst.name, p.service}
		answers[k] = append(answers[k], p)
	}
	seen := m.clone()
	for _, b := range seen.blocks {
		for i, row := range b.cells {
			for j := range row {
				if row[j] == cellUnasked {
					continue
				}
				row[j] = cellOf(answers[key{m.names[i], m.names[j], b.services[0]}])
				for _, s := range b.services[1:] {
					if cellOf(answers[key{m.names[i], m.names[j], s}]) != row[j] {
						row[j] = cellMixed
					}
				}
			}
		}
	}
	return seen
}

// cellOf sums up the families of one service.
func cellOf(probes []*probe) byte {
	var yes, no int
	cell := byte(cellDenied)
	for _, p := range probes {
		if !p.answered {
			no++
			continue
		}
		yes++
		cell = cellIPv4
		if p.to.Is6() {
			cell = cellIPv6
		}
	}
	if yes > 0 && no == 0 {
		return cellAllowed
	}
	return cell
}

// columnKey is the letter under which a row's name stands as a column.
func columnKey(i int) byte {
	return "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[i%52]
}

// printer writes matrices, in colour when Colour is set.
type printer struct {
	w      io.Writer
	colour bool
}

// ANSI colours of cells and differences.
const (
	green = "\x1b[32m"
	red   = "\x1b[31m"
	wrong = "\x1b[1;97;41m"
	bold  = "\x1b[1m"
	plain = "\x1b[0m"
)

func (p printer) paint(colour, s string) string {
	if !p.colour || colour == "" {
		return s
	}
	return colour + s + plain
}

// beside prints expected and seen side by side and returns how many cells differ.
func (p printer) beside(expected, seen matrix) int {
	width := 0
	for _, n := range expected.names {
		width = max(width, len(n))
	}
	keys := make([]byte, len(expected.names))
	for i := range keys {
		keys[i] = columnKey(i)
	}
	columns := expected.grouped(func(j int) string { return string(keys[j]) })
	differ := 0
	for k, b := range expected.blocks {
		fmt.Fprintf(p.w, "\n%s\n%*s    %-*s   %s\n", p.paint(bold, b.heading()), width, "", len(columns), "expected", "seen")
		fmt.Fprintf(p.w, "%*s    %s   %s\n", width, "from \\ to", columns, columns)
		for i, name := range expected.names {
			want, got := b.cells[i], seen.blocks[k].cells[i]
			mark := ""
			for j := range want {
				if got[j] != want[j] {
					differ++
					mark = p.paint(wrong, "  <-- differs")
				}
			}
			fmt.Fprintf(p.w, "%-*s  %c %s   %s%s\n", width, name, keys[i],
				expected.grouped(func(j int) string { return p.cell(want[j], want[j]) }),
				expected.grouped(func(j int) string { return p.cell(got[j], want[j]) }), mark)
		}
	}
	return differ
}

// grouped writes one row, with a blank between namespaces, the node and the outside.
func (m matrix) grouped(cell func(j int) string) string {
	group := func(name string) string {
		namespace, _, isPod := strings.Cut(name, "/")
		if isPod || name == "node" {
			return namespace
		}
		return ""
	}
	var row strings.Builder
	for j, name := range m.names {
		if j > 0 && group(name) != group(m.names[j-1]) {
			row.WriteByte(' ')
		}
		row.WriteString(cell(j))
	}
	return row.String()
}

func (p printer) cell(got, want byte) string {
	switch {
	case got != want:
		return p.paint(wrong, string(got))
	case got == cellDenied:
		return p.paint(red, string(got))
	case got == cellUnasked:
		return string(got)
	}
	return p.paint(green, string(got))
}
