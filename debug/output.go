package debug

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// table is rows of cells under a header, printed aligned.
type table struct {
	header []string
	rows   [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write prints the columns two blanks apart, without blanks at line ends; on a terminal
// that is too narrow it folds the widest ones.
func (t *table) write(w io.Writer) error {
	width := make([]int, len(t.header))
	all := append([][]string{t.header}, t.rows...)
	for _, row := range all {
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	natural := width
	width = fitted(all, width, columnsOf(w))
	fold := !slices.Equal(natural, width)
	var line []byte
	out := bufio.NewWriter(w)
	for _, row := range all {
		lines := [][]string{row}
		if fold {
			lines = foldedRow(row, width)
		}
		for _, cells := range lines {
			line = line[:0]
			for i, c := range cells {
				line = append(line, c...)
				for range width[i] - utf8.RuneCountInString(c) + columnGap {
					line = append(line, ' ')
				}
			}
			if _, err := out.Write(append(bytes.TrimRight(line, " "), '\n')); err != nil {
				return err
			}
		}
	}
	return out.Flush()
}

// print writes v in the format asked for; asTable prints the table form.
func (s *session) print(cmd *cobra.Command, v any, asTable func(io.Writer) error) error {
	w := cmd.OutOrStdout()
	switch s.format {
	case "table":
		return asTable(onScreen(w))
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	return errFormat(s.format)
}

func errFormat(format string) error {
	return fmt.Errorf("flag --output is %q: it takes table, json or yaml", format)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func join[T fmt.Stringer](list []T) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = v.String()
	}
	return orDash(strings.Join(out, ","))
}

// first is join of at most n, and how many more there are.
func first[T fmt.Stringer](list []T, n int) string {
	if len(list) <= n {
		return join(list)
	}
	return fmt.Sprintf("%s and %d more", join(list[:n]), len(list)-n)
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// service is the flow's protocol and port as PROTO/PORT.
func (f FlowView) service() string {
	switch f.Protocol {
	case "TCP", "UDP", "SCTP":
		return f.Protocol + "/" + strconv.Itoa(int(f.Port))
	case "ICMP", "ICMPv6":
		return fmt.Sprintf("%s/%d", f.Protocol, f.Port>>8)
	}
	return f.Protocol
}

// printStream prints one of many values: a line of JSON, or a YAML document.
func (s *session) printStream(cmd *cobra.Command, v any) error {
	w := cmd.OutOrStdout()
	switch s.format {
	case "json":
		e := json.NewEncoder(w)
		e.SetEscapeHTML(false)
		return e.Encode(v)
	case "yaml":
		if _, err := io.WriteString(w, "---\n"); err != nil {
			return err
		}
	}
	return s.print(cmd, v, nil)
}
