package agent

import (
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/k8s"
	"github.com/nftcni/nftcni/policy"
)

// TestSourceGoneForAnHour: what is enforced stays, pods that were listed before can still
// be attached and detached, new ones wait and are then asked to try again, and nothing is lost
// when the source is back.
func TestSourceGoneForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		listed := *shopCluster
		db := policy.Name{Namespace: "shop", Name: "db"}
		listed.Pods = append([]policy.Pod{{Name: db, UID: "u2", Node: "n1"}}, shopCluster.Pods...)
		l, ctx := startLoop(t, table, func(l *loop) { l.waitForPods = true })
		_ = l.send(ctx, l.replace(&listed, nil))
		if _, err := l.attach(ctx, attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1")); err != nil {
			t.Fatalf("attach: %v", err)
		}
		away := []k8s.Problem{{Object: "pods", Message: "the API server does not answer"}}
		_ = l.send(ctx, l.apply(nil, away))
		time.Sleep(time.Hour)
		synctest.Wait()
		writes := 0
		_ = l.do(ctx, func() { writes = table.writes })
		if s, err := l.status(ctx); err != nil || !s.Ready || len(s.Problems) != 1 || !table.isolated("10.0.0.1") {
			t.Errorf("after an hour: ready %v, problems %v, isolated %v, %v", s.Ready, s.Problems, table.isolated("10.0.0.1"), err)
		}
		began := time.Now()
		fresh := attachmentOf("shop", "new", "u3", "nft000000000003", "10.0.0.3")
		if _, err := l.attach(ctx, fresh); err == nil || err.Code != codeTryAgain || time.Since(began) != time.Duration(l.cfg.PodWait) {
			t.Errorf("a pod nobody has heard of: %v after %v, want code %d after %v", err, time.Since(began), codeTryAgain, time.Duration(l.cfg.PodWait))
		}
		if _, err := l.attach(ctx, attachmentOf("shop", "db", "u2", "nft000000000002", "10.0.0.2")); err != nil || !table.isolated("10.0.0.2") {
			t.Errorf("a pod that was listed before: %v, isolated %v", err, table.isolated("10.0.0.2"))
		}
		if table.writes != writes+1 {
			t.Errorf("%d writes, want one for the pod that was listed", table.writes-writes)
		}
		_ = l.send(ctx, l.apply([]policy.Event{{Pod: &policy.Pod{Name: policy.Name{Namespace: "shop", Name: "new"}, UID: "u3", Node: "n1"}}}, nil))
		if _, err := l.attach(ctx, fresh); err != nil || !table.isolated("10.0.0.3") {
			t.Errorf("back again: %v, isolated %v", err, table.isolated("10.0.0.3"))
		}
	})
}

// TestNodeRenamed: the last known objects are another node's, so they are not used; what
// the kernel holds stays until the source has told of the pods under the new name.
func TestNodeRenamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, dir := newMemoryTable(), t.TempDir()
		if err := lastKnownOf(shopCluster).save(dir); err != nil { // of n1
			t.Fatal(err)
		}
		l, ctx := startLoop(t, table, func(l *loop) {
			l.cfg.Node, l.inv.node, l.waitForPods, l.cfg.StateDir = "renamed", "renamed", true, dir
			l.inv.attach(attachmentOf("shop", "web", "u1", "nft000000000001", "10.0.0.1"))
		})
		go func() { _ = keepLastKnown(ctx, l, slog.New(slog.DiscardHandler)) }()
		time.Sleep(time.Hour)
		synctest.Wait()
		writes := 0
		_ = l.do(ctx, func() { writes = table.writes })
		if writes != 0 {
			t.Errorf("%d writes by the objects of another node", writes)
		}
		under := *shopCluster
		under.Pods = []policy.Pod{{Name: web, UID: "u1", Node: "renamed"}}
		_ = l.send(ctx, l.replace(&under, nil))
		synctest.Wait()
		if len(table.bindings) != 1 || !table.isolated("10.0.0.1") {
			t.Errorf("under the new name: bindings %v, isolated %v", table.bindings, table.isolated("10.0.0.1"))
		}
		time.Sleep(2 * lastKnownInterval)
		if k, err := loadLastKnown(dir); err != nil || k.node != "renamed" {
			t.Errorf("file of node %q, %v", k.node, err)
		}
	})
}

// TestKernelSecondAgent: one that is started by mistake says who is there already.
func TestKernelSecondAgent(t *testing.T) {
	runtime.LockOSThread() // for good: the thread stays in a network namespace of its own
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("network namespaces: this system does not let the test make one (%v)", err)
	}
	dir := t.TempDir()
	if err := unix.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	first, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(dir); err == nil || !strings.Contains(err.Error(), "another agent (pid ") {
		t.Errorf("the same run directory: %v", err)
	}
	table, err := lockTable()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockTable(); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("another run directory: %v", err)
	}
	if err := table.Close(); err != nil {
		t.Error(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if again, err := lock(dir); err != nil {
		t.Errorf("after the first one ended: %v", err)
	} else if err := again.Close(); err != nil {
		t.Error(err)
	}
}
