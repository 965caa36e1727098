package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"github.com/nftcni/nftcni/cni"
	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

// PublishFunc tells other nodes a pod's addresses (k8s.Cluster.PublishAddresses).
type PublishFunc func(ctx context.Context, pod policy.Name, uid string, addrs []netip.Addr) error

const (
	publishQueue = 4096 // pods; beyond it other nodes learn the address from the kubelet
	publishTries = 5
)

// publication is one pod's addresses on their way to the other nodes.
type publication struct {
	pod   policy.Name
	uid   string
	addrs []netip.Addr
}

// publisher sends publications one after another, so that no pod waits for an API call.
type publisher struct {
	publish PublishFunc
	queue   chan *publication
	log     *slog.Logger
}

func newPublisher(publish PublishFunc, log *slog.Logger) *publisher {
	return &publisher{publish: publish, queue: make(chan *publication, publishQueue), log: log}
}

// add queues p and never blocks.
func (p *publisher) add(x publication) {
	select {
	case p.queue <- &x:
	default:
		p.log.Warn("address not published: too many wait", "pod", x.pod.String())
	}
}

// run sends until ctx ends.
func (p *publisher) run(ctx context.Context) error {
	for {
		select {
		case x := <-p.queue:
			p.send(ctx, *x)
		case <-ctx.Done():
			return nil
		}
	}
}

// send tries a few times, from 50 ms apart on; the kubelet's status is the fallback.
func (p *publisher) send(ctx context.Context, x publication) {
	wait := 50 * time.Millisecond
	for try := 1; ; try++ {
		err := p.publish(ctx, x.pod, x.uid, x.addrs)
		if err == nil || errors.Is(err, k8s.ErrPodGone) || ctx.Err() != nil {
			return
		}
		if try == publishTries {
			p.log.Warn("address not published; other nodes learn it from the kubelet", "pod", x.pod.String(), "err", err)
			return
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait *= 2
	}
}

// publication of the pod of an attachment: the addresses of all its interfaces.
func (v *inventory) publication(a cni.Attachment) (publication, bool) {
	x := publication{pod: podName(a), uid: a.UID}
	for _, at := range v.byPod[x.pod] {
		if at.UID == a.UID {
			x.addrs = append(x.addrs, at.Addresses...)
		}
	}
	return x, a.Pod != "" && a.UID != "" && len(x.addrs) > 0
}
