// Package cyclonus compares the oracle of package policy with an evaluator that other
// people wrote: the matcher of github.com/mattfenwick/cyclonus, over the same random
// clusters and flows. Where the two disagree the API's own text decides; each such
// place is named in differences_test.go, with a test that it is still there.
package cyclonus
