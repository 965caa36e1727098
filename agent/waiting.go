package agent

import (
	"slices"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/policy"
)

// admitOrWait admits w when its pod is known or need not be.
func (l *loop) admitOrWait(b *batch, w *attachWork) {
	a := w.attachment
	if l.live && (!l.waitForPods || a.Pod == "" || l.inv.knows(a)) || l.loaded && !l.live && isStatic(a) {
		l.admitOne(b, w)
		return
	}
	n := podName(a)
	l.waiting[n] = append(l.waiting[n], w)
}

// admitPod admits what waits for a pod that the source now lists.
func (l *loop) admitPod(b *batch, n policy.Name) {
	list := l.waiting[n]
	if len(list) == 0 {
		return
	}
	delete(l.waiting, n)
	for _, w := range list {
		l.admitOrWait(b, w)
	}
}

func (l *loop) admit(b *batch) {
	for n := range l.waiting {
		l.admitPod(b, n)
	}
}

// stopWaiting reports whether w still waited for its pod.
func (l *loop) stopWaiting(w *attachWork) bool {
	n := podName(w.attachment)
	i := slices.Index(l.waiting[n], w)
	if i < 0 {
		return false
	}
	l.waiting[n] = slices.Delete(l.waiting[n], i, i+1)
	if len(l.waiting[n]) == 0 {
		delete(l.waiting, n)
	}
	return true
}

// waited ends the wait of w after cfg.PodWait.
func (l *loop) waited(b *batch, w *attachWork) {
	if !l.loaded || !isStatic(w.attachment) {
		l.giveUp(w)
	} else if l.stopWaiting(w) {
		l.admitOne(b, w)
	}
}

// giveUp refuses w if it still waits for its pod.
func (l *loop) giveUp(w *attachWork) {
	if !l.stopWaiting(w) {
		return
	}
	n := podName(w.attachment)
	if !l.synced {
		w.refuse(tryAgain("attach %s: %v", n, errNotSynced))
		return
	}
	w.refuse(tryAgain("attach %s: the API server has not shown this pod (uid %s) within %v: is it scheduled to node %s?",
		n, w.attachment.UID, time.Duration(l.cfg.PodWait), l.cfg.Node))
}

// dropWaiting refuses an attach that its own DEL overtook.
func (l *loop) dropWaiting(r cni.DetachRequest) {
	for n, list := range l.waiting {
		l.waiting[n] = slices.DeleteFunc(list, func(w *attachWork) bool {
			gone := w.attachment.ContainerID == r.ContainerID && w.attachment.HostInterface == r.HostInterface
			if gone {
				w.refuse(tryAgain("attach %s: deleted while waiting", n))
			}
			return gone
		})
		if len(l.waiting[n]) == 0 {
			delete(l.waiting, n)
		}
	}
}
