package policy

import (
	"encoding/json"
	"slices"
	"strings"
	"unique"
)

// Labels is an immutable, interned set of labels: equal sets are equal values (==),
// and pods that share labels share their storage. The zero value is the empty set.
type Labels struct{ h unique.Handle[string] }

// MakeLabels interns m. Keys and values must not contain NUL (the API's validation
// forbids it).
func MakeLabels(m map[string]string) Labels {
	if len(m) == 0 {
		return Labels{}
	}
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var b strings.Builder
	for _, k := range keys {
		b.WriteString(k)
		b.WriteByte(0)
		b.WriteString(m[k])
		b.WriteByte(0)
	}
	return Labels{unique.Make(b.String())}
}

// All yields the labels in the order of their keys.
func (l Labels) All() func(yield func(key, value string) bool) {
	return func(yield func(key, value string) bool) {
		if l == (Labels{}) {
			return
		}
		for s := l.h.Value(); s != ""; {
			k, rest, _ := strings.Cut(s, "\x00")
			v, rest, _ := strings.Cut(rest, "\x00")
			if !yield(k, v) {
				return
			}
			s = rest
		}
	}
}

// Get returns the value of key and whether the label is present.
func (l Labels) Get(key string) (string, bool) {
	for k, v := range l.All() {
		if k == key {
			return v, true
		}
	}
	return "", false
}

// Map returns a fresh map, for printing and JSON.
func (l Labels) Map() map[string]string {
	m := map[string]string{}
	for k, v := range l.All() {
		m[k] = v
	}
	return m
}

// MarshalJSON writes the labels as an object.
func (l Labels) MarshalJSON() ([]byte, error) { return json.Marshal(l.Map()) }

// UnmarshalJSON reads an object of strings and interns it.
func (l *Labels) UnmarshalJSON(b []byte) error {
	var m map[string]string
	err := json.Unmarshal(b, &m)
	*l = MakeLabels(m)
	return err
}

func (l Labels) String() string {
	var b strings.Builder
	for k, v := range l.All() {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(k + "=" + v)
	}
	return b.String()
}

// Operator of a Requirement (metav1.LabelSelectorOperator).
type Operator uint8

// The four operators of metav1.LabelSelectorRequirement. NotIn and DoesNotExist match
// when the label is absent.
const (
	In Operator = iota
	NotIn
	Exists
	DoesNotExist
)

// Requirement is one condition on one label. Values are sorted and used by In and NotIn.
type Requirement struct {
	Key    string
	Op     Operator
	Values []string
}

// Selector is the conjunction of its requirements; the zero value matches everything.
// An absent selector is not an empty one: the owner of the field says what it means.
type Selector struct{ Requirements []Requirement }

// Matches reports whether l satisfies every requirement.
func (s Selector) Matches(l Labels) bool {
	for _, r := range s.Requirements {
		v, ok := l.Get(r.Key)
		switch r.Op {
		case In:
			ok = ok && slices.Contains(r.Values, v)
		case NotIn:
			ok = !ok || !slices.Contains(r.Values, v)
		case DoesNotExist:
			ok = !ok
		}
		if !ok {
			return false
		}
	}
	return true
}
