package k8s

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apilabels "k8s.io/apimachinery/pkg/labels"
	"pgregory.net/rapid"

	"github.com/nftcni/nftcni/policy"
)

// TestSelectorAgreesWithAPI compares with apimachinery's own selectors.
func TestSelectorAgreesWithAPI(t *testing.T) {
	key, value := rapid.SampledFrom([]string{"a", "b", "c"}), rapid.SampledFrom([]string{"", "x", "z"})
	set := rapid.MapOfN(key, value, 0, 3)
	requirement := rapid.Custom(func(t *rapid.T) metav1.LabelSelectorRequirement {
		r := metav1.LabelSelectorRequirement{Key: key.Draw(t, "key")}
		r.Operator = rapid.SampledFrom([]metav1.LabelSelectorOperator{metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn,
			metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist}).Draw(t, "operator")
		if r.Operator == metav1.LabelSelectorOpIn || r.Operator == metav1.LabelSelectorOpNotIn {
			r.Values = rapid.SliceOfN(value, 1, 3).Draw(t, "values")
		}
		return r
	})
	rapid.Check(t, func(t *rapid.T) {
		s := &metav1.LabelSelector{MatchLabels: set.Draw(t, "matchLabels"), MatchExpressions: rapid.SliceOfN(requirement, 0, 3).Draw(t, "matchExpressions")}
		want, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		var f faults
		got, ok := convertSelector(s, nil, &f)
		if !ok || len(f) > 0 {
			t.Fatalf("refused: %v", f)
		}
		for range 5 {
			m := set.Draw(t, "labels")
			if g, w := got.Matches(policy.MakeLabels(m)), want.Matches(apilabels.Set(m)); g != w {
				t.Fatalf("%v on %v: got %v, want %v", s, m, g, w)
			}
		}
	})
}
