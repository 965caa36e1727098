//go:build ignore

package main

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"slices"
	"strconv"
	"strings"
)

// compiler lists the files of package policy that turn a cluster into tables and deltas;
// the model, the oracle and texts for people are not among them.
var compiler = []string{
	"adopt.go", "atoms.go", "class.go", "crossing.go", "delta.go", "engine.go", "identity.go", "nets.go", "numbers.go",
	"plan.go", "profile.go", "ranges.go", "selectors.go", "split.go", "tidy.go", "transition.go", "turns.go",
}

// mutant is one change of one place. Alone it is source[from:to] replaced by text; in the
// copy that holds all of them the same place gets edits, which do nothing unless the
// mutant is switched on.
type mutant struct {
	file, function, operator string
	old, new                 string // for the name
	nth                      int    // among equal ones of a function
	line                     int
	from, to                 int
	text                     string
	typed                    bool // it may not build
	index                    int  // in the source: outer places come first
	edits                    func(number int) []edit
}

// edit inserts text at an offset, or replaces the token there when cut is not 0.
type edit struct {
	at, cut int
	closes  bool // the end of a place: inner ones come first
	text    string
}

// id does not change when lines move.
func (m mutant) id() string {
	id := fmt.Sprintf("%s %s: %s: %s -> %s", m.file, m.function, m.operator, oneLine(m.old), oneLine(m.new))
	if m.nth > 0 {
		id += " #" + strconv.Itoa(m.nth+1)
	}
	return id
}

// rank orders the mutants: by a hash, so that a change of one file moves no others.
func (m mutant) rank() uint64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s", seed, m.id()))
	return binary.BigEndian.Uint64(sum[:])
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 70 {
		s = string(r[:70]) + "..."
	}
	return s
}

var swapped = map[token.Token]struct {
	to             token.Token
	name, function string
}{
	token.EQL: {token.NEQ, "comparison", ""}, token.NEQ: {token.EQL, "comparison", ""},
	token.LSS: {token.LEQ, "boundary", "mutantLess"}, token.LEQ: {token.LSS, "boundary", "mutantLessOrEqual"},
	token.GTR: {token.GEQ, "boundary", "mutantGreater"}, token.GEQ: {token.GTR, "boundary", "mutantGreaterOrEqual"},
	token.LAND: {token.LOR, "and-or", "mutantAnd"}, token.LOR: {token.LAND, "and-or", "mutantOr"},
	token.ADD: {token.SUB, "arithmetic", "mutantAdd"}, token.SUB: {token.ADD, "arithmetic", "mutantSub"},
	token.AND: {token.OR, "arithmetic", "mutantBitAnd"}, token.OR: {token.AND, "arithmetic", "mutantBitOr"},
}

// switches is the file that is added to the copy: which mutant is on, and the operators
// that can be another one.
const switches = `package policy

import (
	"cmp"
	"os"
	"strconv"
)

var (
	mutantOn, _   = strconv.Atoi(os.Getenv("NFTCNI_MUTANT"))
	mutantReached bool
)

// mutantIs reports whether n is on, and tells that its place was reached.
func mutantIs(n int) bool {
	if n != mutantOn {
		return false
	}
	if !mutantReached {
		mutantReached = true
		os.Stderr.WriteString("mutant reached\n")
	}
	return true
}

type integer interface {
	~int | ~int8 | ~int16 | ~int32 | ~int64 | ~uint | ~uint8 | ~uint16 | ~uint32 | ~uint64
}

func mutantNumber[T integer](n int, v T) T {
	if mutantIs(n) {
		return v + 1
	}
	return v
}
`

// writeSwitches adds the functions for operators that can be another one.
func writeSwitches() string {
	var b strings.Builder
	b.WriteString(switches)
	for from, s := range swapped {
		const text = "\nfunc %s(n int, a %s) %s {\n\tif mutantIs(n) {\n\t\treturn a %s %s\n\t}\n\treturn a %s %s\n}\n"
		switch name := s.function; {
		case s.name == "and-or":
			fmt.Fprintf(&b, text, name, "bool, b func() bool", "bool", s.to, "b()", from, "b()")
		case s.name == "boundary":
			fmt.Fprintf(&b, text, name+"[T cmp.Ordered]", "T, b T", "bool", s.to, "b", from, "b")
		case s.name == "arithmetic":
			fmt.Fprintf(&b, text, name+"[T integer]", "T, b T", "T", s.to, "b", from, "b")
		}
	}
	return b.String()
}

// finder collects the mutants of one file.
type finder struct {
	fset     *token.FileSet
	info     *types.Info
	pkg      *types.Package
	source   []byte
	file     string
	function string
	simple   map[ast.Stmt]bool // statements in the head of another one
	skip     map[ast.Node]bool
	seen     map[string]int
	out      []mutant
}

func (f *finder) offset(p token.Pos) int { return f.fset.Position(p).Offset }

func (f *finder) text(n ast.Node) string {
	return string(f.source[f.offset(n.Pos()):f.offset(n.End())])
}

func (f *finder) typeName(e ast.Expr) string {
	return types.TypeString(f.info.TypeOf(e), types.RelativeTo(f.pkg))
}

// add files a mutant of n that is text alone, and between before and after in the copy.
func (f *finder) add(n ast.Node, m mutant, before, after string, more ...edit) {
	m.typed = slices.Contains([]string{"number", "left out", "branch"}, m.operator) || strings.HasPrefix(m.operator, "arithmetic")
	m.file, m.function, m.line = f.file, f.function, f.fset.Position(n.Pos()).Line
	m.from, m.to = f.offset(n.Pos()), f.offset(n.End())
	id := m.id()
	m.nth = f.seen[id]
	f.seen[id]++
	m.edits = func(number int) []edit {
		fill := func(s string) string { return strings.ReplaceAll(s, "@", strconv.Itoa(number)) }
		out := []edit{{at: m.from, text: fill(before)}}
		out = append(out, more...)
		return append(out, edit{at: m.to, closes: true, text: fill(after)})
	}
	f.out = append(f.out, m)
}

// visit applies the operators: negated conditions, swapped comparisons, boundaries, and
// with or, sums, numbers plus one, true with false, break with continue, and statements
// left out. Numbers in types and constants are not changed, nor are those that are only a
// hint (the capacity for make) or a separator (a byte appended to a key).
func (f *finder) visit(n ast.Node) bool {
	if n == nil || f.skip[n] {
		return false
	}
	switch n := n.(type) {
	case *ast.IfStmt:
		f.head(n.Init)
		if b, ok := n.Cond.(*ast.BinaryExpr); !ok || b.Op != token.EQL && b.Op != token.NEQ {
			f.add(n.Cond, mutant{operator: "negate", old: f.text(n.Cond), new: "!(" + f.text(n.Cond) + ")", text: "!(" + f.text(n.Cond) + ")"}, "((", ") != mutantIs(@))")
		}
	case *ast.ForStmt:
		f.head(n.Init, n.Post)
	case *ast.SwitchStmt:
		f.head(n.Init)
	case *ast.GenDecl:
		return n.Tok != token.CONST
	case *ast.ArrayType:
		if n.Len != nil {
			f.skip[n.Len] = true
		}
	case *ast.CallExpr:
		f.skipHints(n)
	case *ast.BinaryExpr:
		f.binary(n)
	case *ast.BasicLit:
		if n.Kind == token.INT {
			to := "(" + n.Value + "+1)"
			f.add(n, mutant{operator: "number", old: n.Value, new: to, text: to}, "mutantNumber["+f.typeName(n)+"](@, ", ")")
		}
	case *ast.Ident:
		if n.Name == "true" || n.Name == "false" {
			to := strconv.FormatBool(n.Name == "false")
			f.add(n, mutant{operator: "boolean", old: n.Name, new: to, text: to}, "(", " != mutantIs(@))")
		}
	case *ast.BranchStmt:
		if n.Label == nil && n.Tok == token.CONTINUE {
			f.add(n, mutant{operator: "branch", old: "continue", new: "break", text: "break"}, "if mutantIs(@) { break }; ", "")
		}
	case *ast.ExprStmt, *ast.IncDecStmt:
		f.leaveOut(n.(ast.Stmt))
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			f.leaveOut(n)
		}
	}
	return true
}

func (f *finder) head(statements ...ast.Stmt) {
	for _, s := range statements {
		if s != nil {
			f.simple[s] = true
		}
	}
}

func (f *finder) skipHints(n *ast.CallExpr) {
	fn, ok := n.Fun.(*ast.Ident)
	if !ok {
		return
	}
	args := map[string]int{"make": 2, "append": 1}[fn.Name]
	if args == 0 || fn.Name == "append" && types.TypeString(f.info.TypeOf(n), nil) != "[]byte" {
		return
	}
	for _, a := range n.Args[min(args, len(n.Args)):] {
		if _, ok := a.(*ast.BasicLit); ok {
			f.skip[a] = true
		}
	}
}

func (f *finder) leaveOut(n ast.Stmt) {
	before, after := "if !mutantIs(@) { ", " }"
	if f.simple[n] {
		before, after = "func() { if !mutantIs(@) { ", " } }()"
	}
	f.add(n, mutant{operator: "left out", old: f.text(n), new: "_ = 0", text: "_ = 0"}, before, after)
}

func (f *finder) binary(n *ast.BinaryExpr) {
	s, ok := swapped[n.Op]
	if !ok {
		return
	}
	op := edit{at: f.offset(n.OpPos), cut: len(n.Op.String()), text: ","}
	before, after := s.function+"["+f.typeName(n.X)+"](@, ", ")"
	edits := []edit{op}
	switch s.name {
	case "comparison":
		before, after, edits = "((", ") != mutantIs(@))", nil
	case "and-or":
		op.text = ", func() bool { return ("
		before, after, edits = s.function+"(@, ", ") })", []edit{op}
	}
	m := mutant{operator: s.name + " in " + oneLine(f.text(n)), old: n.Op.String(), new: s.to.String()}
	m.text = "((" + f.text(n.X) + ") " + s.to.String() + " (" + f.text(n.Y) + "))"
	f.add(n, m, before, after, edits...)
}

// schemata is the source with all of mutants in it, each under its number.
func schemata(source []byte, mutants map[int]mutant) []byte {
	var edits []edit
	var numbers []int
	for n := range mutants {
		numbers = append(numbers, n)
	}
	slices.SortFunc(numbers, func(a, b int) int { return mutants[a].index - mutants[b].index })
	for _, n := range numbers {
		edits = append(edits, mutants[n].edits(n)...)
	}
	slices.SortStableFunc(edits, func(a, b edit) int { return a.at - b.at })
	var out []byte
	at := 0
	for len(edits) > 0 {
		n := 1
		for n < len(edits) && edits[n].at == edits[0].at {
			n++
		}
		here := edits[:n]
		edits = edits[n:]
		out = append(out, source[at:here[0].at]...)
		at = here[0].at
		for _, e := range slices.Backward(here) {
			if e.closes {
				out = append(out, e.text...)
			}
		}
		for _, e := range here {
			if !e.closes {
				out = append(out, e.text...)
				at += e.cut
			}
		}
	}
	return append(out, source[at:]...)
}
