package cyclonus

import (
	"slices"
	"testing"

	"github.com/mattfenwick/cyclonus/pkg/kube"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/nftcni/nftcni/policy"
)

// The differences between cyclonus v0.5.6 and the API, each by name. Where the input
// can be rewritten so that cyclonus answers the API's question, it is: nothing is left
// out of the comparison but what outside names.

// outside names what the API decides before any policy, which cyclonus leaves to others.
func outside(d policy.Decision) string {
	switch d.Reason {
	case policy.SamePod:
		// "a pod cannot block access to itself" (kubernetes.io, Network Policies, first
		// section). cyclonus judges a pod against itself like any other pair.
		return "excluded: same pod"
	case policy.OwnNode:
		// "traffic to and from the node where a Pod is running is always allowed,
		// regardless of the IP address of the Pod or the node" (the same section).
		// cyclonus knows no nodes.
		return "excluded: own node"
	}
	return ""
}

// notInAbsent: "There is a match in the following cases: [...] 4. The operator is
// DoesNotExist or NotIn and Labels does not have the Requirement's key"
// (k8s.io/apimachinery/pkg/labels, Requirement.Matches). cyclonus wants the key. A
// selector becomes those that spell out both cases: NotIn, or DoesNotExist.
func notInAbsent(s policy.Selector) []metav1.LabelSelector {
	out := []metav1.LabelSelector{{}}
	for _, r := range s.Requirements {
		if r.Op == policy.In && len(r.Values) == 1 && out[0].MatchLabels[r.Key] == "" {
			for i := range out {
				out[i] = withLabel(out[i], r.Key, r.Values[0])
			}
			continue
		}
		var next []metav1.LabelSelector
		for _, sel := range out {
			next = append(next, withRequirement(sel, r.Key, operators[r.Op], r.Values))
			if r.Op == policy.NotIn {
				next = append(next, withRequirement(sel, r.Key, metav1.LabelSelectorOpDoesNotExist, nil))
			}
		}
		out = next
	}
	return out
}

var operators = map[policy.Operator]metav1.LabelSelectorOperator{
	policy.In: metav1.LabelSelectorOpIn, policy.NotIn: metav1.LabelSelectorOpNotIn,
	policy.Exists: metav1.LabelSelectorOpExists, policy.DoesNotExist: metav1.LabelSelectorOpDoesNotExist,
}

func withLabel(s metav1.LabelSelector, key, value string) metav1.LabelSelector {
	m := map[string]string{key: value}
	for k, v := range s.MatchLabels {
		m[k] = v
	}
	s.MatchLabels = m
	return s
}

func withRequirement(s metav1.LabelSelector, key string, op metav1.LabelSelectorOperator, values []string) metav1.LabelSelector {
	s.MatchExpressions = append(slices.Clone(s.MatchExpressions), metav1.LabelSelectorRequirement{Key: key, Operator: op, Values: values})
	return s
}

// portNames: severalNames. NetworkPolicyPort.port is "either a numerical or named port
// on a pod", and a container may give one number several names; cyclonus is told one
// name per question. All names of f's port that resolve to it are asked, or none.
func portNames(pod *policy.Pod, f policy.Flow) []string {
	names := []string{""}
	if pod == nil {
		return names
	}
	seen := map[string]bool{}
	for _, p := range pod.Ports {
		// Of equal names with one protocol the first container port counts, as for
		// Services (k8s.io/kubernetes/pkg/api/v1/pod.FindPort).
		if p.Protocol == f.Protocol && !seen[p.Name] {
			seen[p.Name] = true
			if p.Port == f.Port {
				names = append(names, p.Name)
			}
		}
	}
	return names
}

// TestDifferencesAreStillThere fails when a later cyclonus agrees with the API, so that
// the rewriting above can go.
func TestDifferencesAreStillThere(t *testing.T) {
	none := map[string]string{}
	notIn := policy.Selector{Requirements: []policy.Requirement{{Key: "a", Op: policy.NotIn, Values: []string{"b"}}}}
	api := metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"b"}}}}
	real, err := metav1.LabelSelectorAsSelector(&api)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name          string
		cyclonus, api bool
	}{
		{"notInAbsent: cyclonus wants the key", kube.IsLabelsMatchLabelSelector(none, api), false},
		{"notInAbsent: the API does not", real.Matches(labels.Set{}), true},
		{"notInAbsent: nor do we", notIn.Matches(policy.MakeLabels(none)), true},
		{"emptyValue: cyclonus takes an absent label for an empty one", kube.IsLabelsMatchLabelSelector(none, metav1.LabelSelector{MatchLabels: map[string]string{"a": ""}}), true},
		{"emptyValue: we do not", policy.Selector{Requirements: []policy.Requirement{{Key: "a", Values: []string{""}}}}.Matches(policy.MakeLabels(none)), false},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.cyclonus != row.api {
				t.Errorf("got %v, want %v", row.cyclonus, row.api)
			}
		})
	}
}
