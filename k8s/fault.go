package k8s

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// A fault is what validation finds in one field of one object; a Problem without the
// place. With warning set the API server would accept the field, or its meaning is
// certain all the same.
type fault struct {
	warning                bool
	field, message, remedy string
}

// faults collects what is wrong with one object.
type faults []fault

func (f *faults) refuse(at *field.Path, remedy, format string, args ...any) {
	*f = append(*f, fault{field: pathString(at), message: fmt.Sprintf(format, args...), remedy: remedy})
}

func (f *faults) warn(at *field.Path, remedy, format string, args ...any) {
	*f = append(*f, fault{warning: true, field: pathString(at), message: fmt.Sprintf(format, args...), remedy: remedy})
}

// invalid adds one refusal for each of the messages that apimachinery's string
// validators return.
func (f *faults) invalid(at *field.Path, value any, remedy string, messages []string) {
	for _, m := range messages {
		f.refuse(at, remedy, "invalid value %s: %s", quote(value), m)
	}
}

// fieldErrors adds the errors of apimachinery's own validation.
func (f *faults) fieldErrors(remedy string, errs field.ErrorList) {
	for _, e := range errs {
		*f = append(*f, fault{field: e.Field, message: lowerFirst(e.ErrorBody()), remedy: remedy})
	}
}

// refused reports whether the object as a whole must not come into force.
func (f faults) refused() bool {
	for _, x := range f {
		if !x.warning {
			return true
		}
	}
	return false
}

// problems places the faults. effect says what is in force instead of what was refused.
func (f faults) problems(at Problem, effect string) []Problem {
	out := make([]Problem, 0, len(f))
	for _, x := range f {
		p := at
		p.Severity, p.Field, p.Message, p.Remedy = Warning, x.field, x.message, x.remedy
		if !x.warning {
			p.Severity, p.Effect = Refused, effect
		}
		out = append(out, p)
	}
	return out
}

// quote prints a value from outside: escaped, and cut so that no line gets unreadable.
func quote(v any) string {
	s := fmt.Sprintf("%v", v)
	if len(s) > 80 {
		s = s[:80] + "..."
	}
	return fmt.Sprintf("%q", s)
}

func lowerFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}

// pathString is the path, empty for the object as a whole (nil).
func pathString(at *field.Path) string {
	if at == nil {
		return ""
	}
	return at.String()
}
