package k8s

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/nftcni/nftcni/policy"
)

// ErrPodGone: the pod does not exist, or another one has its name now.
var ErrPodGone = errors.New("pod is gone")

// PublishAddresses sets AnnotationAddresses of the pod, provided that its UID is
// still uid (policy.Pod.UID: that of the static pod for a mirror pod); empty addrs removes it. Trying again is harmless. The error wraps
// ErrPodGone when trying again is pointless.
func (c *Cluster) PublishAddresses(ctx context.Context, pod policy.Name, uid string, addrs []netip.Addr) error {
	var value any
	if len(addrs) > 0 {
		value = joinAddrs(addrs)
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid":         c.apiUID(pod, uid),
		"annotations": map[string]any{AnnotationAddresses: value},
	}})
	if err != nil {
		return fmt.Errorf("publish addresses of pod %s: %w", pod, err)
	}
	err = c.clients.core.Patch(types.MergePatchType).Namespace(pod.Namespace).Resource("pods").Name(pod.Name).
		Body(patch).Do(ctx).Error()
	// Another UID is refused as a change of an immutable field.
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
		err = errors.Join(ErrPodGone, err)
	}
	if err != nil {
		return fmt.Errorf("publish addresses of pod %s: %w", pod, err)
	}
	return nil
}

// PublishNodeKey sets AnnotationPublicKey of this node's Node object. Trying again is
// harmless. The error says so if the Node object does not exist.
func (c *Cluster) PublishNodeKey(ctx context.Context, key string) error {
	fields := strings.Fields(key)
	if err := checkPublicKeys(fields); err != nil {
		return fmt.Errorf("publish the public key of node %s: %w", c.node, err)
	}
	if err := c.annotateNode(ctx, AnnotationPublicKey, strings.Join(fields, " ")); err != nil {
		return fmt.Errorf("publish the public key of node %s: %w", c.node, err)
	}
	return nil
}

// PublishMeshAddresses sets AnnotationMeshAddresses of this node's Node object; empty addrs
// removes it. Trying again is harmless. The error says so if the Node object does not exist.
func (c *Cluster) PublishMeshAddresses(ctx context.Context, addrs []netip.Addr) error {
	var value any
	if len(addrs) > 0 {
		text := joinAddrs(addrs)
		if _, err := parseMeshAddrs(text); err != nil {
			return fmt.Errorf("publish the mesh addresses of node %s: %w", c.node, err)
		}
		value = text
	}
	if err := c.annotateNode(ctx, AnnotationMeshAddresses, value); err != nil {
		return fmt.Errorf("publish the mesh addresses of node %s: %w", c.node, err)
	}
	return nil
}

// annotateNode sets an annotation of this node's Node object, or removes it where value is nil.
func (c *Cluster) annotateNode(ctx context.Context, key string, value any) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{key: value}}})
	if err != nil {
		return err
	}
	return c.clients.core.Patch(types.MergePatchType).Resource("nodes").Name(c.node).Body(patch).Do(ctx).Error()
}

func joinAddrs(addrs []netip.Addr) string {
	parts := make([]string, len(addrs))
	for i, a := range addrs {
		parts[i] = a.String()
	}
	return strings.Join(parts, ",")
}

// Record queues a Kubernetes Event of type Warning on a Pod or NetworkPolicy. It never
// blocks: beyond 256 waiting Events more are dropped. All nodes give the same event
// about the same object the same name, so that it is stored once.
func (c *Cluster) Record(kind string, object policy.Name, uid, reason, message string) {
	if len(message) > 1000 {
		message = strings.ToValidUTF8(message[:1000], "") + "..."
	}
	hash := fnv.New64a()
	for _, s := range []string{kind, uid, reason, message} {
		hash.Write([]byte(s + "\x00"))
	}
	base := object.Name[:min(len(object.Name), 200)]
	apiVersion := corev1.SchemeGroupVersion.String()
	if kind == KindNetworkPolicy {
		apiVersion = networkingv1.SchemeGroupVersion.String()
	}
	now := metav1.NewTime(time.Now())
	e := &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: object.Namespace, Name: fmt.Sprintf("%s.%x", strings.TrimRight(base, "-."), hash.Sum64())},
		InvolvedObject:      corev1.ObjectReference{APIVersion: apiVersion, Kind: kind, Namespace: object.Namespace, Name: object.Name, UID: types.UID(uid)},
		Reason:              reason,
		Message:             message,
		Type:                corev1.EventTypeWarning,
		Count:               1,
		FirstTimestamp:      now,
		LastTimestamp:       now,
		Source:              corev1.EventSource{Component: "nftcni-agent", Host: c.node},
		ReportingController: "nftcni.io/agent",
		ReportingInstance:   c.node,
	}
	select {
	case c.events <- e:
	default:
		c.log.Debug("event dropped", "object", object, "reason", reason)
	}
}

// sendEvents stores queued Events, one at a time, until ctx is done.
func (c *Cluster) sendEvents(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-c.events:
			err := c.clients.core.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
			if err != nil && !apierrors.IsAlreadyExists(err) && ctx.Err() == nil {
				c.log.Debug("event not stored", "object", e.InvolvedObject.Name, "reason", e.Reason, "err", err)
			}
		}
	}
}
