//go:build ignore

package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// runLog is what earlier runs of the same package found, so that a whole run can be done
// in parts. nil: none.
type runLog struct {
	file     *os.File
	outcomes map[string]outcome
}

// openLog reads the outcomes in path that the package in dir has, its tests included.
func openLog(path, dir string) (*runLog, error) {
	if path == "" {
		return nil, nil
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	digest := sha256.New()
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		digest.Write(text)
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	l := &runLog{file, map[string]outcome{}}
	of := ""
	s := bufio.NewScanner(file)
	for s.Scan() {
		what, id, _ := strings.Cut(s.Text(), "\t")
		if what == "package" {
			of = id
			clear(l.outcomes)
		} else {
			l.outcomes[id] = outcome(what)
		}
	}
	if sum := fmt.Sprintf("%x", digest.Sum(nil)); of != sum {
		clear(l.outcomes)
		_, err = fmt.Fprintf(file, "package\t%s\n", sum)
	}
	return l, errors.Join(err, s.Err())
}

func (l *runLog) known(m mutant) outcome {
	if l == nil {
		return ""
	}
	return l.outcomes[m.id()]
}

func (l *runLog) add(m mutant, o outcome) error {
	if l == nil {
		return nil
	}
	_, err := fmt.Fprintf(l.file, "%s\t%s\n", o, m.id())
	return err
}

// report says what became of the mutants, and how many survived without an explanation.
func (j *job) report(note string) (string, int) {
	counts := map[outcome]int{}
	var lines []string
	unexplained := 0
	for i, m := range j.chosen {
		r := j.results[i]
		if r.outcome == "" {
			continue
		}
		counts[r.outcome]++
		if r.outcome != survived {
			continue
		}
		why := j.known[m.id()]
		if why == "" {
			why = "NOT EXPLAINED"
			unexplained++
		}
		lines = append(lines, fmt.Sprintf("- `%s`\n  %s\n", m.id(), why))
	}
	slices.Sort(lines)
	dead := counts[killed] + counts[tooLong]
	built := dead + counts[survived]
	var b strings.Builder
	b.WriteString(intro)
	if note != "" {
		b.WriteString(note + "\n\n")
	}
	fmt.Fprintf(&b, "| | |\n|---|---|\n| mutants there are | %d |\n| run | %d |\n| do not build, not counted | %d |\n| built | %d |\n| killed by a test | %d |\n| killed by the limit of %d s of CPU | %d |\n| survived | %d (%.1f%%) |\n| survived, not explained | %d |\n| CPU time of the fast suite | %.1f s |\n\n",
		len(j.all), built+counts[noBuild], counts[noBuild], built, counts[killed], j.limit, counts[tooLong], counts[survived], 100*float64(counts[survived])/float64(max(1, built)), unexplained, j.suiteCPU.Seconds())
	fmt.Fprintf(&b, "## Survivors\n\n%s", strings.Join(lines, ""))
	return b.String(), unexplained
}

const intro = `# Mutants of the policy compiler

Written by ` + "`scripts/mutate --write docs/mutants.md`" + `.

One thing at a time is changed in the files that turn a cluster into tables and deltas (the
list is in scripts/mutants.go), and the fast suite must notice. Operators, fixed: a condition
negated; == and != swapped; < and <=, > and >=; && and ||; + and -, & and |; a number plus one;
true and false; continue and break; a statement left out. Not changed, because nothing that is
decided can depend on it: numbers in types and constants, capacities given to make, and bytes
appended to a key as separators.

All mutants are compiled into one copy of the package, outside of the tree, each behind a switch
(a mutant that cannot be switched is built alone), and the suite runs once for each.
A survivor is a failure unless scripts/mutants-explained says why it is none.

`
