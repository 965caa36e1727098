package debug

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A table folds its widest columns on a narrow terminal, loses nothing, and stays as it is
// in a pipe.
func TestTableOnScreen(t *testing.T) {
	table := &table{header: []string{"POD", "LABELS", "NOTE"}, rows: [][]string{
		{"web-0", "app=web,tier=frontend,release=stable", "-"},
		{"db", "app=db", "host network: its node's address"},
	}}
	for _, test := range []struct {
		name    string
		columns int
		want    string
	}{
		{"pipe", 0, `
POD    LABELS                                NOTE
web-0  app=web,tier=frontend,release=stable  -
db     app=db                                host network: its node's address
`},
		{"wide enough", 79, `
POD    LABELS                                NOTE
web-0  app=web,tier=frontend,release=stable  -
db     app=db                                host network: its node's address
`},
		{"narrow", 56, `
POD    LABELS                   NOTE
web-0  app=web,tier=frontend,   -
       release=stable
db     app=db                   host network: its node's
                                address
`},
		{"too narrow for the words", 20, `
POD    LABELS            NOTE
web-0  app=web,          -
       tier=frontend,
       release=stable
db     app=db            host network:
                         its node's
                         address
`},
	} {
		t.Run(test.name, func(t *testing.T) {
			var b strings.Builder
			if err := table.write(screen{&b, test.columns}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.TrimPrefix(test.want, "\n"), b.String()); diff != "" {
				t.Error(diff)
			}
			for line := range strings.Lines(b.String()) {
				if test.columns > 30 && len(strings.TrimSuffix(line, "\n")) > test.columns {
					t.Errorf("%q is wider than %d", line, test.columns)
				}
			}
		})
	}
	times := [][]string{{"2026-11-21T06:29:08Z", "shop/a-rather-long-name-of-a-pod"}}
	if got := fitted(times, []int{20, 32}, 40); got[0] < 20 || got[1] < 32 {
		t.Errorf("widths %v cut a time or a name", got)
	}
	if got := folded("sha256:0123456789abcdef", 10); strings.Join(got, "") != "sha256:0123456789abcdef" || len(got) != 3 {
		t.Errorf("%q", got)
	}
}
