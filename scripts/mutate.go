//go:build ignore

// Command mutate is scripts/mutate: see there.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// compiler lists the files of package policy that turn a cluster into tables and deltas;
// the model, the oracle and texts for people are not among them.
var compiler = []string{
	"adopt.go", "atoms.go", "class.go", "delta.go", "engine.go", "identity.go", "nets.go",
	"plan.go", "profile.go", "ranges.go", "selectors.go", "split.go", "tidy.go", "turns.go",
}

// mutant replaces source[from:to] of a file by text.
type mutant struct {
	file, function, operator string
	from, to                 int
	old, text                string
	nth                      int // among equal ones of a function
	line                     int
}

// id does not change when lines move.
func (m mutant) id() string {
	id := fmt.Sprintf("%s %s: %s: %s -> %s", m.file, m.function, m.operator, oneLine(m.old), oneLine(m.text))
	if m.nth > 0 {
		id += " #" + strconv.Itoa(m.nth+1)
	}
	return id
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if r := []rune(s); len(r) > 70 {
		s = string(r[:70]) + "..."
	}
	return s
}

var swapped = map[token.Token]struct {
	to   token.Token
	name string
}{
	token.EQL: {token.NEQ, "comparison"}, token.NEQ: {token.EQL, "comparison"},
	token.LSS: {token.LEQ, "boundary"}, token.LEQ: {token.LSS, "boundary"},
	token.GTR: {token.GEQ, "boundary"}, token.GEQ: {token.GTR, "boundary"},
	token.LAND: {token.LOR, "and-or"}, token.LOR: {token.LAND, "and-or"},
	token.ADD: {token.SUB, "arithmetic"}, token.SUB: {token.ADD, "arithmetic"},
	token.AND: {token.OR, "arithmetic"}, token.OR: {token.AND, "arithmetic"},
}

// finder collects the mutants of one file.
type finder struct {
	fset     *token.FileSet
	source   []byte
	file     string
	function string
	out      []mutant
}

func (f *finder) add(operator string, from, to token.Pos, text string) {
	a, b := f.fset.Position(from).Offset, f.fset.Position(to).Offset
	m := mutant{file: f.file, function: f.function, operator: operator, from: a, to: b, old: string(f.source[a:b]), text: text, line: f.fset.Position(from).Line}
	for _, o := range f.out {
		if o.id() == m.id() {
			m.nth++
		}
	}
	for slices.ContainsFunc(f.out, func(o mutant) bool { return o.id() == m.id() }) {
		m.nth++
	}
	f.out = append(f.out, m)
}

func (f *finder) text(n ast.Node) string {
	return string(f.source[f.fset.Position(n.Pos()).Offset:f.fset.Position(n.End()).Offset])
}

// visit applies the operators: negated conditions, swapped comparisons, boundaries, and
// with or, sums, numbers plus one, true with false, break with continue, and statements left out.
func (f *finder) visit(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.IfStmt:
		f.add("negate", n.Cond.Pos(), n.Cond.End(), "!("+f.text(n.Cond)+")")
	case *ast.BinaryExpr:
		if s, ok := swapped[n.Op]; ok {
			end := n.OpPos + token.Pos(len(n.Op.String()))
			f.add(s.name+" in "+oneLine(f.text(n)), n.OpPos, end, s.to.String())
		}
	case *ast.BasicLit:
		if n.Kind == token.INT {
			f.add("number", n.Pos(), n.End(), "("+n.Value+"+1)")
		}
	case *ast.Ident:
		if n.Name == "true" || n.Name == "false" {
			f.add("boolean", n.Pos(), n.End(), strconv.FormatBool(n.Name == "false"))
		}
	case *ast.BranchStmt:
		if n.Label == nil && n.Tok == token.CONTINUE {
			f.add("branch", n.Pos(), n.End(), "break")
		}
	case *ast.ExprStmt, *ast.IncDecStmt:
		f.add("left out", n.Pos(), n.End(), "_ = 0")
	case *ast.AssignStmt:
		if n.Tok != token.DEFINE {
			f.add("left out", n.Pos(), n.End(), "_ = 0")
		}
	}
	return true
}

// find lists every mutant in a fixed order. Operators that give the same program
// (negating a lone comparison and swapping it) count once.
func find(dir string) ([]mutant, error) {
	var all []mutant
	for _, name := range compiler {
		path := filepath.Join(dir, name)
		source, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		f := &finder{fset: token.NewFileSet(), source: source, file: name}
		parsed, err := parser.ParseFile(f.fset, path, source, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range parsed.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
				f.function = fn.Name.Name
				ast.Inspect(fn.Body, f.visit)
			}
		}
		all = append(all, f.out...)
	}
	return slices.DeleteFunc(all, func(m mutant) bool {
		return m.operator == "negate" && slices.ContainsFunc(all, func(o mutant) bool {
			return o.file == m.file && strings.HasPrefix(o.operator, "comparison in ") && o.from >= m.from && o.to <= m.to && o.operator == "comparison in "+oneLine(m.old)
		})
	}), nil
}

type outcome string

const (
	killed   outcome = "killed"
	survived outcome = "survived"
	noBuild  outcome = "does not build"
)

// runner builds and runs mutants in a directory of its own.
type runner struct{ root, tmp string }

// suite is the fast suite: every test of the package with little effort.
var suite = []string{"-test.failfast", "-test.short", "-test.timeout=60s", "-rapid.checks=30", "-rapid.nofailfile"}

func (r runner) run(m *mutant) (outcome, time.Duration, error) {
	binary, dir := filepath.Join(r.tmp, "suite"), filepath.Join(r.root, "policy")
	args := []string{"test", "-c", "-vet=off", "-o", binary}
	if m != nil {
		source, err := os.ReadFile(filepath.Join(dir, m.file))
		if err != nil {
			return "", 0, err
		}
		changed := slices.Concat(source[:m.from], []byte(m.text), source[m.to:])
		file, overlay := filepath.Join(r.tmp, m.file), filepath.Join(r.tmp, "overlay.json")
		list, err := json.Marshal(map[string]any{"Replace": map[string]string{filepath.Join(dir, m.file): file}})
		if err != nil {
			return "", 0, err
		}
		if err := errors.Join(os.WriteFile(file, changed, 0o600), os.WriteFile(overlay, list, 0o600)); err != nil {
			return "", 0, err
		}
		args = append(args, "-overlay", overlay)
	}
	build := exec.Command("go", append(args, "./policy")...)
	build.Dir = r.root
	if out, err := build.CombinedOutput(); err != nil {
		if m == nil || !bytes.Contains(out, []byte(m.file+":")) {
			return "", 0, fmt.Errorf("go test -c: %w\n%s", err, out)
		}
		return noBuild, 0, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	// A mutant may loop and allocate: the shell bounds its address space.
	test := exec.CommandContext(ctx, "sh", append([]string{"-c", `ulimit -v 6000000; exec "$@"`, "sh", binary}, suite...)...)
	test.Dir = r.tmp
	test.Env = append(os.Environ(), "NFTCNI_EFFORT=fast")
	start := time.Now()
	out, err := test.CombinedOutput()
	if m == nil && err != nil {
		return "", 0, fmt.Errorf("the suite fails without a mutant: %w\n%s", err, out)
	}
	if err != nil {
		return killed, time.Since(start), nil
	}
	return survived, test.ProcessState.UserTime() + test.ProcessState.SystemTime(), nil
}

// explained reads the survivors that are known, each with why: "id | reason".
func explained(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string]string{}
	s := bufio.NewScanner(f)
	for s.Scan() {
		if id, why, ok := strings.Cut(s.Text(), " | "); ok && !strings.HasPrefix(id, "#") {
			out[id] = why
		}
	}
	return out, s.Err()
}

func main() {
	seeded := flag.Int("seeded", 0, "run this many mutants, always the same; 0: all")
	list := flag.Bool("list", false, "list the mutants and run none")
	write := flag.String("write", "", "write the result to this file")
	workers := flag.Int("workers", 2, "how many to run side by side")
	only := flag.String("only", "", "run those whose name contains this, or that a line of this file names")
	flag.Parse()
	if err := mutate(*seeded, *workers, *list, *only, *write); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

const seed = 4 // of the order of the mutants; the first n are --seeded n

func mutate(seeded, workers int, list bool, only, write string) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	all, err := find(filepath.Join(root, "policy"))
	if err != nil {
		return err
	}
	chosen := slices.Clone(all)
	rand.New(rand.NewPCG(seed, 0)).Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
	names, err := os.ReadFile(only)
	lines := strings.Split(string(names), "\n")
	chosen = slices.DeleteFunc(chosen, func(m mutant) bool {
		return err == nil && !slices.Contains(lines, m.id()) || err != nil && !strings.Contains(m.id(), only)
	})
	if seeded > 0 {
		chosen = chosen[:min(seeded, len(chosen))]
	}
	if list {
		for _, m := range chosen {
			fmt.Println(m.id())
		}
		return nil
	}
	known, err := explained("scripts/mutants-explained")
	if err != nil {
		return err
	}
	start := time.Now()
	results, took, err := runAll(root, chosen, workers, known)
	if err != nil {
		return err
	}
	text, unexplained := report(chosen, results, known, len(all), took)
	fmt.Print(text)
	fmt.Printf("\n%v\n", time.Since(start).Round(time.Second))
	if write != "" {
		if err := os.WriteFile(write, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if unexplained > 0 {
		return fmt.Errorf("%d mutants survived that scripts/mutants-explained does not name", unexplained)
	}
	return nil
}

// runAll runs the mutants; took is the CPU time of the suite without a mutant.
func runAll(root string, chosen []mutant, workers int, known map[string]string) (results []outcome, took time.Duration, err error) {
	tmp, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return nil, 0, err
	}
	defer os.RemoveAll(tmp)
	_, took, err = runner{root, tmp}.run(nil)
	if err != nil {
		return nil, 0, err
	}
	results = make([]outcome, len(chosen))
	failed := make([]error, workers)
	next := make(chan int)
	var wg sync.WaitGroup
	for w := range workers {
		dir := filepath.Join(tmp, strconv.Itoa(w))
		if err := os.Mkdir(dir, 0o700); err != nil {
			return nil, 0, err
		}
		wg.Go(func() {
			for i := range next {
				r, _, err := runner{root, dir}.run(&chosen[i])
				results[i], failed[w] = r, errors.Join(failed[w], err)
				if r == survived {
					fmt.Fprintf(os.Stderr, "%d/%d line %d survived: %s | %s\n", i+1, len(chosen), chosen[i].line, chosen[i].id(), known[chosen[i].id()])
				}
			}
		})
	}
	for i := range chosen {
		next <- i
	}
	close(next)
	wg.Wait()
	return results, took, errors.Join(failed...)
}

func report(chosen []mutant, results []outcome, known map[string]string, all int, took time.Duration) (string, int) {
	counts := map[outcome]int{}
	var lines []string
	unexplained := 0
	for i, m := range chosen {
		counts[results[i]]++
		if results[i] != survived {
			continue
		}
		why := known[m.id()]
		if why == "" {
			why = "NOT EXPLAINED"
			unexplained++
		}
		lines = append(lines, fmt.Sprintf("- `%s`\n  %s\n", m.id(), why))
	}
	slices.Sort(lines)
	built := counts[killed] + counts[survived]
	var b strings.Builder
	fmt.Fprintf(&b, "# Mutants of the policy compiler\n\nWritten by `scripts/mutate`; the operators, the seed and the fast suite are in scripts/mutate.go.\n\n")
	fmt.Fprintf(&b, "| | |\n|---|---|\n| mutants there are | %d |\n| run (the first of the seeded order) | %d |\n| do not build, not counted | %d |\n| killed | %d |\n| survived | %d (%.1f%%) |\n| CPU time of the fast suite | %.1f s |\n\n",
		all, len(chosen), counts[noBuild], counts[killed], counts[survived], 100*float64(counts[survived])/float64(max(1, built)), took.Seconds())
	fmt.Fprintf(&b, "## Survivors\n\n%s", strings.Join(lines, ""))
	return b.String(), unexplained
}
