package k8s

import (
	"cmp"
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/nftcni/nftcni/policy"
)

const selectorRemedy = "use matchLabels, or matchExpressions with In, NotIn (both with values), Exists or DoesNotExist (both without)"

// convertSelector converts a metav1.LabelSelector into canonical form: requirements
// sorted and without repetitions, so that selectors that are written differently and
// mean the same are equal. ok is false when it is invalid; the requirements that could
// not be read are then missing, that is, the result selects more than was meant.
func convertSelector(s *metav1.LabelSelector, at *field.Path, f *faults) (sel policy.Selector, ok bool) {
	errs := metav1validation.ValidateLabelSelector(s, metav1validation.LabelSelectorValidationOptions{}, at)
	slices.SortFunc(errs, func(a, b *field.Error) int { return cmp.Compare(a.Error(), b.Error()) })
	f.fieldErrors(selectorRemedy, errs)
	if s == nil {
		return policy.Selector{}, true
	}
	for k, v := range s.MatchLabels {
		sel.Requirements = append(sel.Requirements, policy.Requirement{Key: k, Op: policy.In, Values: []string{v}})
	}
	for _, e := range s.MatchExpressions {
		r := policy.Requirement{Key: e.Key}
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			r.Op = policy.In
		case metav1.LabelSelectorOpNotIn:
			r.Op = policy.NotIn
		case metav1.LabelSelectorOpExists:
			r.Op = policy.Exists
		case metav1.LabelSelectorOpDoesNotExist:
			r.Op = policy.DoesNotExist
		default:
			continue
		}
		if r.Op == policy.In || r.Op == policy.NotIn {
			r.Values = slices.Compact(slices.Sorted(slices.Values(e.Values)))
		}
		sel.Requirements = append(sel.Requirements, r)
	}
	slices.SortFunc(sel.Requirements, compareRequirements)
	sel.Requirements = slices.CompactFunc(sel.Requirements, func(a, b policy.Requirement) bool { return compareRequirements(a, b) == 0 })
	return sel, len(errs) == 0
}

func compareRequirements(a, b policy.Requirement) int {
	return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Op, b.Op), slices.Compare(a.Values, b.Values))
}

// checkLabels reports the labels that the API server would refuse. Messages come in
// the order of the keys.
func checkLabels(labels map[string]string, at *field.Path, f *faults) {
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		f.fieldErrors("use a key of the form [prefix/]name and a value of at most 63 letters, digits, '-', '_' and '.'",
			metav1validation.ValidateLabels(map[string]string{k: labels[k]}, at))
	}
}
