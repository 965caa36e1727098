package debug

import (
	"fmt"
	"html"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// The drawing in pixels: sources on the left, destinations on the right, one row for
// each workload, namespaces framed; an arrow's colour is its source's.
const (
	svgRow     = 26
	svgFrame   = 22 // title of a namespace's frame
	svgGap     = 14
	svgChar    = 7.2
	svgBetween = 420
	svgMargin  = 20
)

const svgLegend = "An arrow is what policy lets through. Thick: everything. Thin: the services beside it. Its colour is its source's."

var svgColours = []string{"#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"}

// svgColumn is where each workload of one side is drawn.
type svgColumn struct {
	x, width int
	y        map[int]int // centre of a workload's row
	body     strings.Builder
	height   int
}

func (p picture) svg(w io.Writer) error {
	used := [2]map[int]bool{{}, {}}
	for _, e := range p.Pairs {
		used[0][e.from], used[1][e.to] = true, true
	}
	left := p.column(svgMargin, used[0], "from")
	right := p.column(svgMargin+left.width+svgBetween, used[1], "to")
	width, height := right.x+right.width+svgMargin, max(left.height, right.height)+2*svgMargin
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height, width, height)
	b.WriteString(`<rect width="100%" height="100%" fill="#ffffff"/>` + "\n")
	b.WriteString(left.body.String() + right.body.String())
	p.arrows(&b, &left, &right)
	fmt.Fprintf(&b, `<text x="%d" y="%d" fill="#666666" font-size="11">%s</text>`+"\n", svgMargin, height-svgMargin/2, html.EscapeString(svgLegend))
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// column places the workloads that have an arrow on this side.
func (p picture) column(x int, used map[int]bool, title string) svgColumn {
	c := svgColumn{x: x, y: map[int]int{}, width: 120}
	for i, e := range p.Workloads {
		if used[i] {
			c.width = max(c.width, int(float64(utf8.RuneCountInString(endLabel(e)))*svgChar)+30)
		}
	}
	fmt.Fprintf(&c.body, `<text x="%d" y="%d" font-weight="bold" fill="#444444">%s</text>`+"\n", x, svgMargin, title)
	at := svgMargin + 12
	for _, group := range p.groups() {
		rows := []int{}
		for i, e := range p.Workloads {
			if e.Namespace == group && used[i] {
				rows = append(rows, i)
			}
		}
		if len(rows) > 0 {
			at = p.frame(&c, group, rows, at)
		}
	}
	c.height = at
	return c
}

// frame draws one namespace with its workloads and returns where the next begins.
func (p picture) frame(c *svgColumn, group string, rows []int, at int) int {
	name := group
	if name == "" {
		name = "outside"
	}
	height := svgFrame + len(rows)*svgRow + 6
	fmt.Fprintf(&c.body, `<rect x="%d" y="%d" width="%d" height="%d" rx="6" fill="#f6f8fa" stroke="#c8ccd0"/>`+"\n", c.x, at, c.width, height)
	fmt.Fprintf(&c.body, `<text x="%d" y="%d" fill="#666666" font-size="11">%s</text>`+"\n", c.x+8, at+15, html.EscapeString(name))
	for k, i := range rows {
		top := at + svgFrame + k*svgRow
		c.y[i] = top + (svgRow-4)/2
		fmt.Fprintf(&c.body, `<rect x="%d" y="%d" width="%d" height="%d" rx="4" fill="#ffffff" stroke="%s"/>`+"\n",
			c.x+8, top, c.width-16, svgRow-4, svgColour(i))
		label := strings.TrimPrefix(endLabel(p.Workloads[i]), group+"/")
		fmt.Fprintf(&c.body, `<text x="%d" y="%d">%s</text>`+"\n", c.x+15, top+15, html.EscapeString(label))
	}
	return at + height + svgGap
}

func svgColour(i int) string { return svgColours[i%len(svgColours)] }

// arrows are curves; each is labelled where its label has room, and a title tells all
// when the pointer rests on it. Arrows for everything are thick and have no label.
func (p picture) arrows(b *strings.Builder, left, right *svgColumn) {
	edges := slices.Clone(p.Pairs)
	slices.SortStableFunc(edges, func(x, y pair) int { return x.from - y.from })
	taken := svgLabels{}
	for _, e := range edges {
		x1, y1 := left.x+left.width-8, left.y[e.from]
		x2, y2 := right.x+8, right.y[e.to]
		colour, stroke := svgColour(e.from), 1.3
		if e.Services == "all" {
			stroke = 2.6
		}
		title := html.EscapeString(fmt.Sprintf("%s to %s: %s", e.Src, e.Dst, e.Services))
		fmt.Fprintf(b, `<path d="M%d,%d C%d,%d %d,%d %d,%d" fill="none" stroke="%s" stroke-width="%.1f" opacity="0.75"><title>%s</title></path>`+"\n",
			x1, y1, x1+svgBetween/2, y1, x2-svgBetween/2, y2, x2-7, y2, colour, stroke, title)
		fmt.Fprintf(b, `<path d="M%d,%d l-8,-4 v8 z" fill="%s"/>`+"\n", x2, y2, colour)
		if e.Services == "all" {
			continue
		}
		text := shorten(e.Services, 28)
		if x, y, ok := taken.place(utf8.RuneCountInString(text), [4]int{x1, y1, x2, y2}); ok {
			fmt.Fprintf(b, `<text x="%.0f" y="%.0f" font-size="10" fill="%s" text-anchor="middle" stroke="#ffffff" stroke-width="3" paint-order="stroke">%s</text>`+"\n",
				x, y, colour, html.EscapeString(text))
		}
	}
}

// svgLabels are the cells of 8 by 6 pixels that labels cover.
type svgLabels map[[2]int]bool

// place finds room for a label on the arrow from x1, y1 to x2, y2, near its end first;
// none is left in a crowd, where the arrow's title still tells.
func (taken svgLabels) place(characters int, arrow [4]int) (x, y float64, ok bool) {
	half := float64(characters)*3 + 4
	for t := 0.86; t > 0.2; t -= 0.03 {
		x, y = bezier(t, arrow[0], arrow[2]), bezierY(t, arrow[1], arrow[3])-3
		if x+half > float64(arrow[2]) {
			continue // under the box
		}
		var cells [][2]int
		for cx := int(x-half) / 8; cx <= int(x+half)/8; cx++ {
			for cy := int(y-10) / 6; cy <= int(y+2)/6; cy++ {
				cells = append(cells, [2]int{cx, cy})
			}
		}
		if slices.ContainsFunc(cells, func(c [2]int) bool { return taken[c] }) {
			continue
		}
		for _, c := range cells {
			taken[c] = true
		}
		return x, y, true
	}
	return 0, 0, false
}

// bezier is x of the curve at t, whose control points lie half way.
func bezier(t float64, x1, x2 int) float64 {
	a, d := float64(x1), float64(x2)
	b, c := a+svgBetween/2, d-svgBetween/2
	u := 1 - t
	return u*u*u*a + 3*u*u*t*b + 3*u*t*t*c + t*t*t*d
}

func bezierY(t float64, y1, y2 int) float64 {
	a, d := float64(y1), float64(y2)
	u := 1 - t
	return (u*u*u+3*u*u*t)*a + (3*u*t*t+t*t*t)*d
}

func shorten(s string, most int) string {
	if utf8.RuneCountInString(s) <= most {
		return s
	}
	return string([]rune(s)[:most-1]) + "…"
}
