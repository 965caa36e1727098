package debug

import (
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// screen is a terminal: tables that are wider are folded to its columns.
type screen struct {
	io.Writer
	columns int
}

// page is text of a screen that is not written yet.
type page struct {
	strings.Builder
	columns int
}

// onScreen wraps w when it is a terminal. A pipe gets whole lines, for grep and cut.
func onScreen(w io.Writer) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return w
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return w
	}
	return screen{w, int(size.Col)}
}

// columnsOf is how wide a line of w may be, 0 for any width.
func columnsOf(w io.Writer) int {
	switch w := w.(type) {
	case screen:
		return w.columns
	case *page:
		return w.columns
	}
	return 0
}

// leastColumn is the width below which a column is not folded, longestWord the length up
// to which what has no blank or comma in it stays whole: times, addresses, names.
const (
	leastColumn = 16
	longestWord = 48
)

// columnGap is the blanks between two columns.
const columnGap = 2

// fitted are the widths of a table's columns so that a line has at most so many characters,
// 0 meaning any. A table that cannot be folded to that stays as wide as its words are.
func fitted(rows [][]string, width []int, columns int) []int {
	total := columnGap * (len(width) - 1)
	for _, n := range width {
		total += n
	}
	if columns == 0 || total <= columns {
		return width
	}
	width = slices.Clone(width)
	least := leastWidths(rows, len(width))
	for total > columns {
		widest := -1
		for i, n := range width {
			if n > least[i] && (widest < 0 || n > width[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		cut := min(total-columns, max(1, width[widest]-secondWidest(width)), width[widest]-least[widest])
		width[widest] -= cut
		total -= cut
	}
	return width
}

// leastWidths are the longest words of every column.
func leastWidths(rows [][]string, columns int) []int {
	least := make([]int, columns)
	for i := range least {
		least[i] = leastColumn
	}
	for _, row := range rows {
		for i, cell := range row {
			for word := range strings.FieldsFuncSeq(cell, func(c rune) bool { return c == ' ' || c == ',' }) {
				if n := utf8.RuneCountInString(word) + 1; n <= longestWord { // with the comma
					least[i] = max(least[i], n)
				}
			}
		}
	}
	return least
}

func secondWidest(width []int) int {
	sorted := slices.Sorted(slices.Values(width))
	return sorted[max(0, len(sorted)-2)]
}

// folded breaks a cell into lines of at most width, after a blank or a comma where there
// is one.
func folded(cell string, width int) []string {
	var out []string
	for utf8.RuneCountInString(cell) > width {
		runes := []rune(cell)
		end := width
		for i := width; i > width/3; i-- {
			if runes[i-1] == ',' || runes[i-1] == ' ' || runes[i] == ' ' {
				end = i
				break
			}
		}
		out = append(out, strings.TrimRight(string(runes[:end]), " "))
		cell = strings.TrimLeft(string(runes[end:]), " ")
	}
	return append(out, cell)
}

// foldedRow is a row as the lines it takes.
func foldedRow(row []string, width []int) [][]string {
	lines := [][]string{}
	for i, cell := range row {
		for n, part := range folded(cell, width[i]) {
			if n == len(lines) {
				lines = append(lines, make([]string, len(row)))
			}
			lines[n][i] = part
		}
	}
	return lines
}
