//go:build ignore

// Command mutate is scripts/mutate: see there.
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const seed = 4 // of the order of the mutants; the first n are --seeded n

// source is package policy, parsed and checked once.
type source struct {
	dir    string
	fset   *token.FileSet
	names  []string
	files  map[string]*ast.File
	text   map[string][]byte
	lookup types.Importer
	info   *types.Info
	pkg    *types.Package
}

func load(root string) (*source, error) {
	s := &source{
		dir: filepath.Join(root, "policy"), fset: token.NewFileSet(), files: map[string]*ast.File{}, text: map[string][]byte{},
		info: &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}},
	}
	out, err := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", "./policy").Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	exports := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		exports[path] = file
	}
	s.lookup = importer.ForCompiler(s.fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	names, err := filepath.Glob(filepath.Join(s.dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, path := range names {
		name := filepath.Base(path)
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		if s.text[name], err = os.ReadFile(path); err != nil {
			return nil, err
		}
		if s.files[name], err = parser.ParseFile(s.fset, name, s.text[name], parser.SkipObjectResolution); err != nil {
			return nil, err
		}
		s.names = append(s.names, name)
	}
	s.pkg, err = s.check(s.info, nil)
	return s, err
}

// check type-checks the package with some files replaced.
func (s *source) check(info *types.Info, replaced map[string][]byte) (*types.Package, error) {
	var files []*ast.File
	fset := s.fset
	for _, name := range s.names {
		file := s.files[name]
		if text, ok := replaced[name]; ok {
			var err error
			if file, err = parser.ParseFile(fset, "", text, parser.SkipObjectResolution); err != nil {
				return nil, err
			}
		}
		files = append(files, file)
	}
	if text, ok := replaced["switches.go"]; ok {
		file, err := parser.ParseFile(fset, "", text, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	conf := types.Config{Importer: s.lookup}
	return conf.Check("github.com/nftcni/nftcni/policy", fset, files, info)
}

// find lists every mutant in the order of the source.
func (s *source) find() []mutant {
	var all []mutant
	for _, name := range compiler {
		f := &finder{fset: s.fset, info: s.info, pkg: s.pkg, source: s.text[name], file: name, simple: map[ast.Stmt]bool{}, skip: map[ast.Node]bool{}, seen: map[string]int{}}
		for _, d := range s.files[name].Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
				f.function = fn.Name.Name
				ast.Inspect(fn.Body, f.visit)
			}
		}
		all = append(all, f.out...)
	}
	for i := range all {
		all[i].index = i
	}
	return all
}

func (s *source) alone(m mutant) []byte {
	t := s.text[m.file]
	return slices.Concat(t[:m.from], []byte(m.text), t[m.to:])
}

type outcome string

const (
	killed   outcome = "killed"
	tooLong  outcome = "over the limit"
	survived outcome = "survived"
	noBuild  outcome = "does not build"
)

// runner builds and runs copies of the package, in a directory of its own.
type runner struct {
	root, tmp string
	limit     int // seconds of CPU
}

// suite is the fast suite: every test of the package with little effort.
var suite = []string{"-test.failfast", "-test.short", "-test.timeout=5m", "-rapid.checks=30", "-rapid.seed=4", "-rapid.nofailfile"}

// build compiles the tests with some files of the package replaced or added.
func (r runner) build(binary string, replaced map[string][]byte) error {
	list := map[string]string{}
	for name, text := range replaced {
		file := filepath.Join(r.tmp, name)
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return err
		}
		list[filepath.Join(r.root, "policy", name)] = file
	}
	overlay, err := json.Marshal(map[string]any{"Replace": list})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(r.tmp, "overlay.json"), overlay, 0o600); err != nil {
		return err
	}
	cmd := exec.Command("go", "test", "-c", "-vet=off", "-o", filepath.Join(r.tmp, binary), "-overlay", filepath.Join(r.tmp, "overlay.json"), "./policy")
	cmd.Dir = r.root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go test -c: %w\n%s", err, out)
	}
	return nil
}

type result struct {
	outcome
	cpu     time.Duration
	reached bool
	output  []byte
}

// run runs the suite with a mutant on (0: none). It may loop and allocate: the shell bounds
// its CPU time and its address space.
func (r runner) run(binary string, number int) result {
	script := fmt.Sprintf(`ulimit -v 8000000; ulimit -t %d; exec "$@"`, r.limit)
	test := exec.Command("sh", append([]string{"-c", script, "sh", filepath.Join(r.tmp, binary)}, suite...)...)
	test.Dir = r.tmp
	test.Env = append(os.Environ(), "NFTCNI_EFFORT=fast", "NFTCNI_MUTANT="+strconv.Itoa(number), "GOMAXPROCS=1", "GOGC=400")
	out, err := test.CombinedOutput()
	res := result{outcome: survived, output: out, reached: bytes.Contains(out, []byte("mutant reached"))}
	if test.ProcessState != nil {
		res.cpu = test.ProcessState.UserTime() + test.ProcessState.SystemTime()
	}
	switch {
	case err != nil && res.cpu > time.Duration(r.limit)*time.Second*9/10:
		res.outcome = tooLong
	case err != nil:
		res.outcome = killed
	}
	return res
}

// job is everything a run of the program knows.
type job struct {
	*source
	runner
	all, chosen []mutant
	known       map[string]string
	log         *runLog
	until       time.Time // zero: no end
	results     []result
	suiteCPU    time.Duration
}

// place decides how a mutant runs: not at all, in the copy that holds many, or alone.
func (j *job) place() (copied map[string][]byte, alone []int) {
	together := map[string]map[int]mutant{}
	for i, m := range j.chosen {
		if m.typed {
			if _, err := j.check(nil, map[string][]byte{m.file: j.source.alone(m)}); err != nil {
				j.results[i].outcome = noBuild
				continue
			}
		}
		if together[m.file] == nil {
			together[m.file] = map[int]mutant{}
		}
		together[m.file][i+1] = m
	}
	copied = map[string][]byte{"switches.go": []byte(writeSwitches())}
	builds := func(file string, mutants map[int]mutant) bool {
		_, err := j.check(nil, map[string][]byte{file: schemata(j.text[file], mutants), "switches.go": copied["switches.go"]})
		return err == nil
	}
	for file, mutants := range together {
		if !builds(file, mutants) {
			for number, m := range mutants {
				if !builds(file, map[int]mutant{number: m}) {
					alone = append(alone, number-1)
					delete(mutants, number)
				}
			}
		}
		copied[file] = schemata(j.text[file], mutants)
	}
	return copied, alone
}

// runAll runs the chosen mutants; slow builds each by itself.
func (j *job) runAll(slow bool) error {
	if err := j.build("plain", nil); err != nil {
		return err
	}
	first := j.run("plain", 0)
	if first.outcome != survived {
		return fmt.Errorf("the suite fails without a mutant:\n%s", first.output)
	}
	j.suiteCPU = first.cpu
	j.results = make([]result, len(j.chosen))
	copied, alone := j.place()
	if err := j.build("copy", copied); err != nil {
		return err
	}
	if r := j.run("copy", 0); r.outcome != survived {
		return fmt.Errorf("the suite fails in the copy without a mutant:\n%s", r.output)
	}
	fmt.Fprintf(os.Stderr, "%d mutants, %d of them alone; the suite takes %.1f s of CPU\n", len(j.chosen), len(alone), j.suiteCPU.Seconds())
	for i, m := range j.chosen {
		if !j.until.IsZero() && time.Now().After(j.until) {
			break
		}
		if j.results[i].outcome = cmp.Or(j.results[i].outcome, j.log.known(m)); j.results[i].outcome != "" {
			continue
		}
		switch {
		case slow || slices.Contains(alone, i):
			if err := j.build("alone", map[string][]byte{m.file: j.source.alone(m)}); err != nil {
				return err
			}
			j.results[i] = j.run("alone", 0)
		default:
			j.results[i] = j.run("copy", i+1)
		}
		if err := j.log.add(m, j.results[i].outcome); err != nil {
			return err
		}
		if r := j.results[i]; r.outcome == survived {
			fmt.Fprintf(os.Stderr, "%d/%d line %d survived (reached: %v): %s | %s\n", i+1, len(j.chosen), m.line, r.reached, m.id(), j.known[m.id()])
		}
	}
	return nil
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
	slow := flag.Bool("slow", false, "build each mutant by itself")
	write := flag.String("write", "", "write the result to this file")
	only := flag.String("only", "", "run those whose name contains this, or that a line of this file names")
	log := flag.String("log", "", "append each outcome to this file, and take those that it has from it")
	note := flag.String("note", "", "what to say of this run in the result")
	limit := flag.Duration("for", 0, "stop after this time; 0: when all ran")
	flag.Parse()
	if err := mutate(*seeded, *list, *slow, *only, *write, *note, *log, *limit); err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(1)
	}
}

func mutate(seeded int, list, slow bool, only, write, note, log string, limit time.Duration) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	j := &job{runner: runner{root: root, limit: 10}}
	if j.source, err = load(root); err != nil {
		return err
	}
	j.all = j.find()
	j.chosen = choose(j.all, seeded, only)
	if list {
		for _, m := range j.chosen {
			fmt.Println(m.id())
		}
		return nil
	}
	if j.known, err = explained("scripts/mutants-explained"); err != nil {
		return err
	}
	if j.log, err = openLog(log, j.dir); err != nil {
		return err
	}
	if limit > 0 {
		j.until = time.Now().Add(limit)
	}
	if j.tmp, err = os.MkdirTemp("", "mutate"); err != nil {
		return err
	}
	defer os.RemoveAll(j.tmp)
	start := time.Now()
	if err := j.runAll(slow); err != nil {
		return err
	}
	text, unexplained := j.report(note)
	fmt.Print(text)
	fmt.Printf("\n%v\n", time.Since(start).Round(time.Second))
	if write != "" {
		err = os.WriteFile(write, []byte(text), 0o644)
	}
	if unexplained > 0 {
		err = errors.Join(err, fmt.Errorf("%d mutants survived that scripts/mutants-explained does not name", unexplained))
	}
	return err
}

// choose returns the mutants to run, in the seeded order.
func choose(all []mutant, seeded int, only string) []mutant {
	out := slices.Clone(all)
	if only != "" {
		names, err := os.ReadFile(only)
		lines := strings.Split(string(names), "\n")
		out = slices.DeleteFunc(out, func(m mutant) bool {
			return err == nil && !slices.Contains(lines, m.id()) || err != nil && !strings.Contains(m.id(), only)
		})
	}
	slices.SortFunc(out, func(a, b mutant) int { return cmp.Compare(a.rank(), b.rank()) })
	if seeded > 0 && seeded < len(out) {
		out = out[:seeded]
	}
	return out
}
