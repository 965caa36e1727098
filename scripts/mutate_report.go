//go:build ignore

package main

import (
	"fmt"
	"slices"
	"strings"
)

// report says what became of the mutants, and how many survived without an explanation.
func (j *job) report() (string, int) {
	counts := map[outcome]int{}
	var lines []string
	unexplained := 0
	for i, m := range j.chosen {
		r := j.results[i]
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
	fmt.Fprintf(&b, "| | |\n|---|---|\n| mutants there are | %d |\n| run | %d |\n| do not build, not counted | %d |\n| built | %d |\n| killed by a test | %d |\n| killed by the limit of %d s of CPU | %d |\n| survived | %d (%.1f%%) |\n| survived, not explained | %d |\n| CPU time of the fast suite | %.1f s |\n\n",
		len(j.all), len(j.chosen), counts[noBuild], built, counts[killed], j.limit, counts[tooLong], counts[survived], 100*float64(counts[survived])/float64(max(1, built)), unexplained, j.suiteCPU.Seconds())
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

`
