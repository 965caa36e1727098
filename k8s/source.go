package k8s

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/nftcni/nftcni/policy"
)

// Source feeds a Sink with the cluster's objects and every later change of them.
type Source interface {
	// Run calls sink.Replace once the complete state is known, then sink.Apply for
	// every change, until ctx is done, and returns nil then. Any other return is an
	// error that waiting cannot cure (a directory that does not exist, an unusable
	// kubeconfig); an API server that does not answer is waited for.
	Run(ctx context.Context, sink Sink) error
}

// Sink receives what a Source sees. A Source makes one call at a time and waits for it
// to return, so a Sink that blocks slows the Source down and loses nothing. What it is
// given is the Sink's to keep and must not be modified by either side afterwards.
//
// problems is always the complete list of the moment, sorted, nil when there are none;
// it replaces the list of the call before.
type Sink interface {
	// Replace hands over the complete first state. It is called exactly once, before
	// any Apply.
	Replace(cluster *policy.Cluster, problems []Problem)
	// Apply hands over changes, to be applied in this order and together: what one
	// read of one file or one message of the API server changed. Objects that are not
	// mentioned did not change. events is empty when only the problems changed. A pod
	// may be seen before its namespace.
	Apply(events []policy.Event, problems []Problem)
}

// Severity of a Problem.
type Severity uint8

const (
	// Warning: the object is in force as far as it is understood.
	Warning Severity = iota
	// Refused: this version of the object is not in force; Effect says what is.
	Refused
)

func (s Severity) String() string {
	if s == Refused {
		return "refused"
	}
	return "warning"
}

// MarshalText makes a Severity readable in JSON and logs.
func (s Severity) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText wrote; anything unknown counts as Refused.
func (s *Severity) UnmarshalText(b []byte) error {
	*s = Refused
	if string(b) == Warning.String() {
		*s = Warning
	}
	return nil
}

// Problem is something a user should mend. It is comparable.
type Problem struct {
	Severity Severity `json:"severity"`
	File     string   `json:"file,omitempty"`     // path of the manifest, empty for an API object
	Document int      `json:"document,omitempty"` // number of the YAML document in File, from 1
	Line     int      `json:"line,omitempty"`     // line of File where the document starts, or of the error, from 1
	Object   string   `json:"object,omitempty"`   // "NetworkPolicy default/web"; empty if it could not be read
	Field    string   `json:"field,omitempty"`    // "spec.ingress[0].from[1].ipBlock.cidr"
	Message  string   `json:"message"`            // what is wrong
	Effect   string   `json:"effect,omitempty"`   // what is in force instead
	Remedy   string   `json:"remedy,omitempty"`   // what to do
}

// String is the Problem on one line: place, object, field, message, effect, remedy.
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d", p.Line)
		}
		b.WriteString(": ")
	}
	for _, part := range []string{p.Object, p.Field} {
		if part != "" {
			b.WriteString(part + ": ")
		}
	}
	b.WriteString(p.Message)
	for _, part := range []string{p.Effect, p.Remedy} {
		if part != "" {
			b.WriteString("; " + part)
		}
	}
	return b.String()
}

func compareProblems(a, b Problem) int {
	return cmp.Or(
		cmp.Compare(a.File, b.File),
		cmp.Compare(a.Line, b.Line),
		cmp.Compare(a.Document, b.Document),
		cmp.Compare(a.Object, b.Object),
		cmp.Compare(a.Field, b.Field),
		cmp.Compare(a.Message, b.Message),
	)
}

// sortProblems sorts and removes repetitions; no problems is nil.
func sortProblems(ps []Problem) []Problem {
	if len(ps) == 0 {
		return nil
	}
	slices.SortFunc(ps, compareProblems)
	return slices.Compact(ps)
}

// where is the place of the Problem as file:line.
func (p Problem) where() string { return fmt.Sprintf("%s:%d", p.File, p.Line) }
