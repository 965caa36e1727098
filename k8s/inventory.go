package k8s

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/nftcni/nftcni/policy"
)

// An inventory is what a set of manifest files says is there: which version of which
// object of which file is in force. Its cost per change depends on the objects of the
// files that changed, not on how many there are.
type inventory struct {
	files      map[string]*heldFile
	candidates map[objectKey][]*held // by compareHeld; the first one is in force
	inForce    map[objectKey]*held
	// members counts the pods and policies in force by namespace: a namespace is
	// there because it has a manifest or because it has members.
	members    map[string]int
	namespaces map[string]policy.Namespace // in force, implied ones included
	duplicates map[objectKey][]duplicate
}

// A duplicate is a definition that is not in force because of the one in file winner.
type duplicate struct {
	winner  string
	problem Problem
}

// A heldFile is what is held of one file.
type heldFile struct {
	objects  []*held
	problems []Problem
}

// held is one object of one file.
type held struct {
	key   objectKey
	place Problem
	value policy.Event
	// accepted is false for the isolating substitute of a policy that was never valid.
	accepted bool
	// kept: the file's present version was refused; this is the last accepted one.
	kept bool
}

func newInventory() *inventory {
	return &inventory{
		files:      map[string]*heldFile{},
		candidates: map[objectKey][]*held{},
		inForce:    map[objectKey]*held{},
		members:    map[string]int{},
		namespaces: map[string]policy.Namespace{},
		duplicates: map[objectKey][]duplicate{},
	}
}

// update takes over the files as they are now, nil for a file that is gone, and returns
// the changes of what is in force, in an order in which they may be applied one by one:
// what isolates comes before what it protects, what goes comes last.
func (inv *inventory) update(files map[string]*parsedFile) []policy.Event {
	touched := map[objectKey]bool{}
	next := map[string]*heldFile{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if files[name] != nil {
			next[name] = inv.hold(name, files[name])
		}
	}
	for name := range files {
		inv.exchange(name, next[name], touched)
	}
	var events []policy.Event
	spaces := map[string]bool{}
	for key := range touched {
		if e, ok := inv.resolve(key, spaces); ok {
			events = append(events, e)
		}
	}
	for name := range spaces {
		if e, ok := inv.resolveNamespace(name); ok {
			events = append(events, e)
		}
	}
	slices.SortFunc(events, compareEvents)
	return events
}

// hold decides for every object of a file which version of it is held: the one the file
// has now if it is valid, else the last accepted one, else for a policy its isolating
// substitute.
func (inv *inventory) hold(name string, parsed *parsedFile) *heldFile {
	f := &heldFile{problems: parsed.problems}
	seen := map[objectKey]bool{}
	for i := range parsed.manifests {
		m := &parsed.manifests[i]
		seen[m.key] = true
		h := &held{key: m.key, place: m.place, value: m.value, accepted: true}
		effect := ""
		if m.faults.refused() {
			h, effect = inv.substitute(name, m)
		}
		f.problems = append(f.problems, m.faults.problems(m.place, effect)...)
		if h != nil {
			f.objects = append(f.objects, h)
		}
	}
	if old := inv.files[name]; old != nil && parsed.unreadable {
		for _, h := range old.objects {
			if !seen[h.key] {
				f.objects = append(f.objects, &held{key: h.key, place: h.place, value: h.value, accepted: h.accepted, kept: true})
			}
		}
	}
	f.problems = limitProblems(sortProblems(f.problems))
	return f
}

// substitute is what is held instead of a refused manifest, and how to say so.
func (inv *inventory) substitute(name string, m *manifest) (*held, string) {
	var last *held
	if old := inv.files[name]; old != nil {
		for _, h := range old.objects {
			if h.key == m.key && h.accepted {
				last = h
				break
			}
		}
	}
	if h := inv.inForce[m.key]; last == nil && h != nil && h.accepted {
		last = h
	}
	switch {
	case last != nil:
		return &held{key: m.key, place: m.place, value: last.value, accepted: true, kept: true}, "its last accepted version stays in force"
	case m.isolating != nil:
		return &held{key: m.key, place: m.place, value: policy.Event{Policy: m.isolating}, kept: true}, "the pods it selects are isolated until it is valid"
	}
	return nil, "the object is not in force"
}

// exchange replaces what is held of a file and notes the objects concerned.
func (inv *inventory) exchange(name string, next *heldFile, touched map[objectKey]bool) {
	if old := inv.files[name]; old != nil {
		for _, h := range old.objects {
			touched[h.key] = true
			c := slices.DeleteFunc(inv.candidates[h.key], func(x *held) bool { return x == h })
			if len(c) == 0 {
				delete(inv.candidates, h.key)
			} else {
				inv.candidates[h.key] = c
			}
		}
	}
	if next == nil {
		delete(inv.files, name)
		return
	}
	inv.files[name] = next
	for _, h := range next.objects {
		touched[h.key] = true
		c := append(inv.candidates[h.key], h)
		slices.SortStableFunc(c, compareHeld)
		inv.candidates[h.key] = c
	}
}

// compareHeld orders the versions of one object: valid before kept before isolating,
// then by path, then by place in the file. The first one wins.
func compareHeld(a, b *held) int {
	rank := func(h *held) int {
		switch {
		case !h.accepted:
			return 2
		case h.kept:
			return 1
		}
		return 0
	}
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.place.File, b.place.File), cmp.Compare(a.place.Document, b.place.Document))
}

// resolve puts the winner among the candidates of key in force. Namespaces are left to
// resolveNamespace: their names, and those of members that came or went, are added to
// spaces.
func (inv *inventory) resolve(key objectKey, spaces map[string]bool) (policy.Event, bool) {
	inv.noteDuplicates(key)
	old, next := inv.inForce[key], (*held)(nil)
	if c := inv.candidates[key]; len(c) > 0 {
		next = c[0]
		next.numberGeneration(old)
		inv.inForce[key] = next
	} else {
		delete(inv.inForce, key)
	}
	if key.kind == "Namespace" {
		spaces[key.name] = true
		return policy.Event{}, false
	}
	if key.namespace != "" && (old == nil) != (next == nil) {
		spaces[key.namespace] = true
		if next != nil {
			inv.members[key.namespace]++
		} else if inv.members[key.namespace]--; inv.members[key.namespace] == 0 {
			delete(inv.members, key.namespace)
		}
	}
	switch {
	case old == nil && next == nil:
		return policy.Event{}, false
	case next == nil:
		return deletion(old.value), true
	case old != nil && reflect.DeepEqual(old.value, next.value):
		return policy.Event{}, false
	}
	return next.value, true
}

// numberGeneration counts the versions of a policy, as the API server does with
// metadata.generation: one more than old's if anything else differs.
func (h *held) numberGeneration(old *held) {
	if h.value.Policy == nil || h == old {
		return
	}
	p := *h.value.Policy
	p.Generation = 1
	if old != nil && old.value.Policy != nil {
		p.Generation = old.value.Policy.Generation
		if !reflect.DeepEqual(&p, old.value.Policy) {
			p.Generation++
		}
	}
	h.value.Policy = &p
}

func (inv *inventory) noteDuplicates(key objectKey) {
	c := inv.candidates[key]
	if len(c) < 2 {
		delete(inv.duplicates, key)
		return
	}
	var ds []duplicate
	for _, h := range c[1:] {
		p := h.place
		p.Severity, p.Field, p.Message = Refused, "metadata.name", "defined more than once"
		p.Effect = "the definition in " + c[0].place.where() + " is in force"
		p.Remedy = "remove one of the definitions"
		ds = append(ds, duplicate{c[0].place.File, p})
	}
	inv.duplicates[key] = ds
}

// resolveNamespace decides what a namespace is now: its manifest, implied by its
// members, or gone.
func (inv *inventory) resolveNamespace(name string) (policy.Event, bool) {
	old, had := inv.namespaces[name]
	var next policy.Namespace
	if h := inv.inForce[objectKey{kind: "Namespace", name: name}]; h != nil {
		next = *h.value.Namespace
	} else if inv.members[name] > 0 {
		next = namespaceWith(name, nil)
	} else {
		delete(inv.namespaces, name)
		return policy.Event{Delete: true, Namespace: &old}, had
	}
	inv.namespaces[name] = next
	return policy.Event{Namespace: &next}, !had || old != next
}

// problems is the complete list. Definitions in files that vanished a moment ago are no
// duplicates: files are renamed.
func (inv *inventory) problems(vanished map[string]time.Time) []Problem {
	var out []Problem
	for _, f := range inv.files {
		out = append(out, f.problems...)
	}
	for _, ds := range inv.duplicates {
		for _, d := range ds {
			_, winnerGone := vanished[d.winner]
			if _, gone := vanished[d.problem.File]; !gone && !winnerGone {
				out = append(out, d.problem)
			}
		}
	}
	return sortProblems(out)
}

// cluster is everything in force, sorted by name.
func (inv *inventory) cluster() *policy.Cluster {
	return snapshot(func(yield func(policy.Event) bool) {
		for key, h := range inv.inForce {
			if key.kind != "Namespace" && !yield(h.value) {
				return
			}
		}
		for _, ns := range inv.namespaces {
			if !yield(policy.Event{Namespace: &ns}) {
				return
			}
		}
	})
}

// maxProblems is how many problems of one file are told.
const maxProblems = 100

func limitProblems(ps []Problem) []Problem {
	if len(ps) <= maxProblems {
		return ps
	}
	p := Problem{Severity: Refused, File: ps[0].File, Line: ps[maxProblems].Line, Message: "more problems in this file are not listed", Remedy: "mend the ones above first"}
	return append(ps[:maxProblems:maxProblems], p)
}
