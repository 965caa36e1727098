package debug

import (
	"encoding/json"
	"reflect"
	"regexp"
	"testing"

	"github.com/nftcni/nftcni/agent"
)

// What -o json|yaml prints has lower-camel names in every struct, so that no Go name of
// another package becomes part of the form that programs read.
func TestOutputFieldNames(t *testing.T) {
	camel := regexp.MustCompile(`^[a-z][a-zA-Z0-9]*$`)
	marshaler := reflect.TypeFor[json.Marshaler]()
	textual := reflect.TypeFor[interface{ MarshalText() ([]byte, error) }]()
	seen := map[reflect.Type]bool{}
	beforeComma := regexp.MustCompile(`^[^,]*`)
	var walk func(reflect.Type, string)
	walk = func(v reflect.Type, path string) {
		switch v.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Array, reflect.Map:
			walk(v.Elem(), path)
			return
		}
		if v.Kind() != reflect.Struct || seen[v] || v.Implements(marshaler) || v.Implements(textual) {
			return
		}
		seen[v] = true
		for f := range v.Fields() {
			name := beforeComma.FindString(f.Tag.Get("json"))
			switch {
			case name == "-" || !f.IsExported() && !f.Anonymous:
			case f.Anonymous && name == "":
				walk(f.Type, path)
			case !camel.MatchString(name):
				t.Errorf("%s.%s of %s has the JSON name %q, which is not lower camel case", path, f.Name, v, name)
			default:
				walk(f.Type, path+"."+name)
			}
		}
	}
	for command, v := range map[string]any{
		"status": statusAnswer{}, "pods": []PodRow{}, "policies": []PolicyRow{}, "ipam": []LeaseRow{}, "why": []Answer{},
		"flows": agent.Flow{}, "drops": drops{}, "trace": Hop{}, "doctor": []Finding{}, "wait": agent.Enforced{}, "verify": Verification{},
		"impact": Impact{}, "matrix": picture{}, "render": []rendered{}, "test": []Expectation{},
	} {
		walk(reflect.TypeOf(v), command)
	}
}
