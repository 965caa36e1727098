package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/nftcni/nftcni/k8s"
)

// restore puts the last known objects in force while the source is unknown. Attachments
// wait all the same, except those of static pods: the file cannot know their pods.
//
// A table with bindings was written by a predecessor after the file was, so it stays as
// it is; the objects are kept in case somebody deletes it.
func (l *loop) restore(ctx context.Context, b *batch, k *lastKnown) {
	if l.loaded {
		return
	}
	l.last = k
	age := k.at.Format(time.RFC3339)
	state, err := l.table.State(ctx)
	switch {
	case err != nil:
		l.log.Error("the last known objects are not put in force: the table is unreadable", "err", err)
		return
	case len(state.Bindings) > 0:
		l.log.Warn("the source does not answer: the rules of the agent before stay in force", "lastKnownObjects", age)
		l.note(k8s.Problem{Severity: k8s.Warning, Message: "the source of the objects has not answered since the agent started",
			Effect: "the rules that the agent before left stay in force; new pods wait", Remedy: sourceRemedy})
		return
	}
	l.log.Warn("the source does not answer: the last known objects are in force", "at", age, "objects", len(k.objects))
	c := k.cluster()
	l.load(b, c)
	l.admit(b)
	l.note(k8s.Problem{Severity: k8s.Warning, Message: "the source of the objects has not answered since the agent started",
		Effect: fmt.Sprintf("the objects of %s are in force; new pods wait, static pods start with unknown labels", age), Remedy: sourceRemedy})
}

const sourceRemedy = "check the API server's address and that it runs"

func lostProblem(err error) k8s.Problem {
	return k8s.Problem{Severity: k8s.Refused, Message: err.Error(),
		Effect: "no pod of this node can send or receive until the source answers, unless the rules of the agent before are there", Remedy: sourceRemedy}
}

// note adds a problem of the agent's own; the source's first list replaces it.
func (l *loop) note(p k8s.Problem) {
	if !l.live {
		l.problems = append(l.problems, p)
	}
}
