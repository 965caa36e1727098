package debug

import (
	"bufio"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nftcni/nftcni/agent"
	"github.com/nftcni/nftcni/policy"
)

// Expectation is one line of an expectations file and what came of it.
type Expectation struct {
	Line    int    `json:"line"`
	Src     string `json:"src"`
	Dst     string `json:"dst"`
	Service string `json:"service"`
	Allow   bool   `json:"allow"`
	Passed  bool   `json:"passed"`
	Because string `json:"because,omitempty"` // why the verdict is what it is, when it is not as expected
}

func (e Expectation) name() string {
	return fmt.Sprintf("%s %s %s %s", e.Src, e.Dst, e.Service, allowDeny(e.Allow))
}

func (s *session) testCommand() *cobra.Command {
	var files, junit string
	cmd := &cobra.Command{
		Use:   "test -f DIR EXPECTATIONS",
		Short: "Check policies against expectations, for CI",
		Long: "Check policies against expectations, for CI. Each line of EXPECTATIONS is\n\n" +
			"  SRC DST PROTO/PORT allow|deny\n\n" +
			"with SRC and DST as namespace/pod, a pod's name, an address, world, or\n" +
			"namespace/label=value[,label=value], which stands for any pod with these labels.\n" +
			"A # begins a comment. An expectation must hold for every address family that both\n" +
			"ends have. Exit status 1: an expectation fails or a manifest is refused.",
		Example: "  nftcni policy test -f ./manifests expectations.txt\n  nftcni policy test -f ./manifests expectations.txt --junit report.xml",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, refused := checkManifests(files, noticeTo(cmd))
			if c == nil {
				return refused
			}
			list, err := readExpectations(args[0])
			if err != nil {
				return err
			}
			if err := check(cmd.Context(), c, list); err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if junit != "" {
				if err := writeJUnit(junit, args[0], list); err != nil {
					return err
				}
			}
			if err := s.print(cmd, list, func(w io.Writer) error { return writeExpectations(w, list) }); err != nil {
				return err
			}
			return errors.Join(failures(list), refused)
		},
	}
	requireFilename(cmd, &files)
	cmd.Flags().StringVar(&junit, "junit", "", "write a JUnit report to this file")
	return cmd
}

func failures(list []Expectation) error {
	failed := 0
	for _, e := range list {
		if !e.Passed {
			failed++
		}
	}
	if failed == 0 {
		return nil
	}
	return fmt.Errorf("%d of %s failed", failed, plural(len(list), "expectation"))
}

func writeExpectations(w io.Writer, list []Expectation) error {
	for _, e := range list {
		if e.Passed {
			continue
		}
		if _, err := fmt.Fprintf(w, "FAIL line %d: %s\n     it is %s: %s\n", e.Line, e.name(), allowDeny(!e.Allow), e.Because); err != nil {
			return err
		}
	}
	passed := 0
	for _, e := range list {
		if e.Passed {
			passed++
		}
	}
	_, err := fmt.Fprintf(w, "%d of %s passed\n", passed, plural(len(list), "expectation"))
	return err
}

func readExpectations(path string) ([]Expectation, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read expectations: %w", err)
	}
	defer func() { _ = f.Close() }()
	out := []Expectation{}
	scan := bufio.NewScanner(f)
	for n := 1; scan.Scan(); n++ {
		text, _, _ := strings.Cut(scan.Text(), "#")
		fields := strings.Fields(text)
		if len(fields) == 0 {
			continue
		}
		if len(fields) != 4 || fields[3] != "allow" && fields[3] != "deny" {
			return nil, fmt.Errorf("%s:%d: %q: want SRC DST PROTO/PORT allow|deny", path, n, strings.TrimSpace(text))
		}
		out = append(out, Expectation{Line: n, Src: fields[0], Dst: fields[1], Service: fields[2], Allow: fields[3] == "allow"})
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no expectation: a gate that checks nothing would always pass", path)
	}
	return out, nil
}

// check evaluates the expectations with the oracle, every pod being local.
func check(ctx context.Context, c *policy.Cluster, list []Expectation) error {
	var err error
	for _, e := range list {
		for _, end := range []string{e.Src, e.Dst} {
			if c, err = withInvented(c, end); err != nil {
				return fmt.Errorf("line %d: %w", e.Line, err)
			}
		}
	}
	snap := agent.Snapshot{Cluster: c}
	for i := range list {
		e := &list[i]
		q, err := newQuestion(ctx, c, []string{e.Src, e.Dst, e.Service})
		if err != nil {
			return fmt.Errorf("line %d: %w", e.Line, err)
		}
		answers, err := q.answers(ctx, snap, kernel{})
		if err != nil {
			return fmt.Errorf("line %d: %w", e.Line, err)
		}
		e.Passed = true
		for _, a := range answers {
			if a.Allowed != e.Allow {
				e.Passed, e.Because = false, decidedBy(a)
			}
		}
	}
	return nil
}

// decidedBy says what an answer rests on.
func decidedBy(a Answer) string {
	var parts []string
	for i, s := range []Side{a.Egress, a.Ingress} {
		if (s.oracle.Action == policy.Allow) != a.Allowed || s.oracle.Reason == policy.NotLocal {
			continue
		}
		text := [2]string{"egress: ", "ingress: "}[i] + s.Because
		if s.Nearest != "" {
			text += " (" + s.Nearest + ")"
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, "; ")
}

// withInvented adds a pod for an end written as namespace/label=value,...; other ends
// leave c as it is.
func withInvented(c *policy.Cluster, end string) (*policy.Cluster, error) {
	namespace, labels, ok := strings.Cut(end, "/")
	if !ok || !strings.Contains(labels, "=") {
		return c, nil
	}
	if slices.ContainsFunc(c.Pods, func(p policy.Pod) bool { return p.Name.String() == end }) {
		return c, nil
	}
	m := map[string]string{}
	for pair := range strings.SplitSeq(labels, ",") {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("%q: a label is written key=value", end)
		}
		m[k] = v
	}
	out := *c
	out.Pods = append(slices.Clone(c.Pods), policy.Pod{Name: policy.Name{Namespace: namespace, Name: labels},
		Labels: policy.MakeLabels(m), Addrs: isolatedAddr(len(c.Pods))})
	if !slices.ContainsFunc(c.Namespaces, func(n policy.Namespace) bool { return n.Name == namespace }) {
		out.Namespaces = append(slices.Clone(c.Namespaces), policy.Namespace{Name: namespace,
			Labels: policy.MakeLabels(map[string]string{"kubernetes.io/metadata.name": namespace})})
	}
	return &out, nil
}

// junitSuite is the form that CI systems read (one suite, a case for each expectation).
type junitSuite struct {
	XMLName  xml.Name    `xml:"testsuite"`
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Name    string        `xml:"name,attr"`
	Class   string        `xml:"classname,attr"`
	Failure *junitFailure `xml:"failure,omitempty"`
}

type junitFailure struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

func writeJUnit(path, source string, list []Expectation) error {
	suite := junitSuite{Name: source, Tests: len(list)}
	for _, e := range list {
		c := junitCase{Name: e.name(), Class: source}
		if !e.Passed {
			suite.Failures++
			c.Failure = &junitFailure{Message: "it is " + allowDeny(!e.Allow), Text: fmt.Sprintf("line %d: %s", e.Line, e.Because)}
		}
		suite.Cases = append(suite.Cases, c)
	}
	b, err := xml.MarshalIndent(suite, "", "  ")
	if err != nil {
		return fmt.Errorf("encode JUnit report: %w", err)
	}
	return os.WriteFile(path, append([]byte(xml.Header), append(b, '\n')...), 0o644)
}
