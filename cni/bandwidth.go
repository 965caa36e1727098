package cni

import (
	"fmt"
	"math"

	"github.com/containernetworking/cni/pkg/types"
)

// Limits of a rate in bits a second: those of the kubernetes.io/ingress-bandwidth and
// egress-bandwidth annotations (Kubernetes, pkg/util/bandwidth: 1k to 1P).
const (
	minRate = 1_000
	maxRate = 1_000_000_000_000_000
)

// noBurst is the first burst that says nothing, in bits: the annotations have none, so
// runtimes write the largest number at hand (containerd 2^32-1). Taken literally, a pod of
// 10 Mbit/s would send 512 MiB before its limit is felt.
const noBurst = math.MaxInt32

// The bucket when no burst is asked for: a tenth of a second, and at least two of the
// largest packets that the stack hands over in one piece.
const (
	burstPart  = 10
	leastBurst = 128 << 10 // bytes
)

// bandwidth is the capability "bandwidth" (CNI conventions): rates in bits a second and
// bursts in bits, seen from the pod. A rate of 0 is no limit.
type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

func (b *bandwidth) limitsIngress() bool { return b != nil && b.IngressRate > 0 }
func (b *bandwidth) limitsEgress() bool  { return b != nil && b.EgressRate > 0 }

// check returns an error that names the field.
func (b *bandwidth) check() error {
	for _, d := range []struct {
		direction   string
		rate, burst uint64
	}{{"ingress", b.IngressRate, b.IngressBurst}, {"egress", b.EgressRate, b.EgressBurst}} {
		switch {
		case d.rate == 0 && d.burst != 0:
			return wrong("runtimeConfig.bandwidth.%sBurst: is set and %sRate is not; set the rate too, or neither", d.direction, d.direction)
		case d.rate != 0 && (d.rate < minRate || d.rate > maxRate):
			return wrong("runtimeConfig.bandwidth.%sRate: %d bit/s is not between 1k and 1P (%d and %d); change the pod's annotation kubernetes.io/%s-bandwidth",
				d.direction, d.rate, uint64(minRate), uint64(maxRate), d.direction)
		}
	}
	return nil
}

// A bucket is a token bucket as the kernel's tbf takes it.
type bucket struct {
	rate   uint64 // bytes a second
	buffer uint32 // the burst as the time it takes at that rate, in ticks of 64 ns
	limit  uint32 // bytes that may wait
}

// The kernel's PSCHED_SHIFT is 6 (include/net/pkt_sched.h): a tick is 64 ns.
const ticksPerSecond = 1_000_000_000 / 64

const ethernetHeader = 14

// waitPart is how much of a second's bytes may wait behind the burst: 25 ms, as in the
// reference plugin.
const waitPart = 40

// makeBucket turns bits into what the kernel takes. The burst is at least one packet of
// mtu bytes, which would never pass otherwise, and one that is longer than the kernel's 274 s
// is cut to that.
func makeBucket(rateBits, burstBits uint64, mtu int) bucket {
	rate := rateBits / 8
	burst := burstBits / 8
	if burstBits == 0 || burstBits >= noBurst {
		burst = max(rate/burstPart, leastBurst)
	}
	burst = min(max(burst, uint64(mtu+ethernetHeader)), math.MaxUint32/2)
	return bucket{
		rate:   rate,
		buffer: clamp(burst*ticksPerSecond/rate + 1),
		limit:  clamp(burst + rate/waitPart),
	}
}

func clamp(n uint64) uint32 { return uint32(min(n, math.MaxUint32)) }

// unsupportedBandwidth reports a kernel without a part that a limit needs: code 2.
func unsupportedBandwidth(direction, part, module string, err error) error {
	return types.NewError(types.ErrUnsupportedField, "runtimeConfig.bandwidth."+direction+"Rate: the node's kernel has no "+part+
		": load it (modprobe "+module+") or drop the pod's annotation kubernetes.io/"+direction+"-bandwidth", fmt.Sprint(err))
}
