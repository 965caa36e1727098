package agent

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

func TestHistogram(t *testing.T) {
	h := newHistogram()
	for _, micros := range []int64{0, 50, 51, 1000, 20_000_000} {
		h.observe(micros)
	}
	for bound, want := range map[int]uint64{0: 2, 1: 1, 4: 1, len(h.Counts) - 1: 1} {
		if h.Counts[bound] != want {
			t.Errorf("bucket %d holds %d, want %d", bound, h.Counts[bound], want)
		}
	}
	var m dto.Metric
	if err := h.metric(prometheus.NewDesc("x", "x", nil, nil)).Write(&m); err != nil {
		t.Fatal(err)
	}
	if got := m.GetHistogram(); got.GetSampleCount() != 5 || got.Bucket[len(got.Bucket)-1].GetCumulativeCount() != 4 {
		t.Errorf("as a Prometheus histogram: %v", got)
	}
}

// TestDashboardMetrics: the dashboard and the alerts use metrics that exist.
func TestDashboardMetrics(t *testing.T) {
	o := newObservers(newLoop(Config{}, slog.New(slog.NewTextHandler(io.Discard, nil)), nil), nil, "test")
	known := newCollector(o).desc
	name := regexp.MustCompile(`\bnftcni_[a-z_]+`)
	for _, file := range []string{"../deploy/grafana-dashboard.json", "../deploy/alerts.yaml"} {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range name.FindAllString(string(b), -1) {
			base := strings.TrimSuffix(strings.TrimPrefix(m, "nftcni_"), "_bucket")
			if known[base] == nil {
				t.Errorf("%s uses %s, which the agent does not have", file, m)
			}
		}
	}
}

func TestFlowRing(t *testing.T) {
	l := newFlowLog()
	for i := range flowRing + 10 {
		l.add(rawFlow{clientPort: uint16(i)})
	}
	raw, out, _ := l.since(5, flowRing)
	if len(raw) != flowRing || out.Missed != 5 || out.Next != flowRing+10 {
		t.Errorf("after 5: %d flows, %d missed, next %d; want %d, 5, %d", len(raw), out.Missed, out.Next, flowRing, flowRing+10)
	}
	last := uint16((flowRing + 9) & 0xffff)
	if l.drops() != 5 {
		t.Errorf("%d drops are counted, want 5", l.drops())
	}
	if got := raw[len(raw)-1].clientPort; got != last {
		t.Errorf("the newest has port %d, want %d", got, last)
	}
	if raw, out, _ := l.since(out.Next, 10); len(raw) != 0 || out.Missed != 0 {
		t.Errorf("nothing new: %d flows, %d missed", len(raw), out.Missed)
	}
	if raw, _, _ := l.since(0, 3); len(raw) != 3 || raw[2].clientPort != last {
		t.Errorf("the newest 3: %v", raw)
	}
}

func TestFlowFileRotates(t *testing.T) {
	path := t.TempDir() + "/flows.json"
	f, err := openFlowFile(path, 200)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := f.write([]Flow{{Verdict: "denied", Protocol: "TCP"}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.close(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(strings.TrimSuffix(path, "/flows.json"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"flows.json", "flows.json.1", "flows.json.2"}; !slices.Equal(names, want) {
		t.Errorf("files %v, want %v", names, want)
	}
}

// TestFlowLine holds the form of a line of the flow log, which log shippers parse.
func TestFlowLine(t *testing.T) {
	path := t.TempDir() + "/flows.json"
	f, err := openFlowFile(path, flowFileBytes)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	err = f.write([]Flow{
		{Seq: 7, At: at, Verdict: "denied", Protocol: "TCP", Src: netip.MustParseAddrPort("10.0.0.1:40000"), Dst: netip.MustParseAddrPort("[fd00::1]:80"),
			SrcPod: "shop/web", DstPod: "shop/db", Policy: "shop/db rule 0"},
		{Seq: 8, At: at, Verdict: "allowed", Protocol: "ICMP", Src: netip.MustParseAddrPort("10.0.0.1:0"), Dst: netip.MustParseAddrPort("192.0.2.1:2048")},
	})
	if err := errors.Join(err, f.close()); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"seq":7,"at":"2026-01-02T03:04:05.000000006Z","verdict":"denied","src":"10.0.0.1:40000","dst":"[fd00::1]:80","protocol":"TCP",` +
		`"srcPod":"shop/web","dstPod":"shop/db","policy":"shop/db rule 0"}
{"seq":8,"at":"2026-01-02T03:04:05.000000006Z","verdict":"allowed","src":"10.0.0.1:0","dst":"192.0.2.1:2048","protocol":"ICMP"}
`
	if string(got) != want {
		t.Errorf("the flow log holds\n%swant\n%s", got, want)
	}
}

// TestProbes: /healthz answers as soon as the loop does, /readyz when the source's state is
// in force, and both say so when the loop is stuck.
func TestProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var o *observers
		l, ctx := startLoop(t, newMemoryTable(), func(l *loop) { o = newObservers(l, l.log, "test") })
		probe := func(path string, status int, text string) {
			t.Helper()
			w := httptest.NewRecorder()
			o.handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
			if w.Code != status || !strings.Contains(w.Body.String(), text) || !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s: %d %q, want %d with %q", path, w.Code, w.Body, status, text)
			}
		}
		probe("/healthz", http.StatusOK, `"ok":true`)
		probe("/readyz", http.StatusServiceUnavailable, errNotSynced.Error())
		_ = l.send(ctx, l.replace(shopCluster, nil))
		synctest.Wait()
		probe("/readyz", http.StatusOK, `"ok":true`)
		free := make(chan struct{})
		_ = l.send(ctx, func(*batch) { <-free })
		probe("/healthz", http.StatusServiceUnavailable, "does not answer")
		probe("/readyz", http.StatusServiceUnavailable, "does not answer")
		close(free)
		probe("/healthz", http.StatusOK, `"ok":true`)
	})
}

func TestSnapshotFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadSnapshotFile(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v, want fs.ErrNotExist", err)
	}
	if err := os.WriteFile(dir+"/"+SnapshotName, []byte(`{"node": "n"`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSnapshotFile(dir); err == nil {
		t.Error("half a file is no error")
	}
}

// TestSnapshotFileWhole: what is written object by object is a Snapshot like the socket's.
func TestSnapshotFileWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, dir := newMemoryTable(), t.TempDir()
		l, ctx := startLoop(t, table, func(l *loop) { l.cfg.RunDir = dir })
		_ = l.send(ctx, l.replace(everyField(), nil))
		want, err := l.snapshot(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var file snapshotFile
		_ = l.do(ctx, func() { file = l.unwritten() })
		if err := writeSnapshotFile(dir, file); err != nil {
			t.Fatal(err)
		}
		got, err := ReadSnapshotFile(dir)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want.Cluster, got.Cluster, sameCluster, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("cluster (-socket +file):\n%s", diff)
		}
		if got.Node != "n1" || got.At.IsZero() || got.Status == nil || got.Status.Pods != 2 || len(got.Enforced) != 1 || len(got.Policies()) != 1 {
			t.Errorf("node %q at %v, status %+v, enforced %v", got.Node, got.At, got.Status, got.Enforced)
		}
	})
}

func TestGarbageShare(t *testing.T) {
	for _, tt := range []struct {
		live uint64
		want int
	}{{0, 50}, {1 << 20, 50}, {10 << 20, 30}, {30 << 20, 10}, {45 << 20, 6}, {1 << 30, 6}} {
		if got := garbageShare(tt.live); got != tt.want {
			t.Errorf("garbageShare(%d) = %d, want %d", tt.live, got, tt.want)
		}
	}
}

func FuzzPacketFlow(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 80})
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 8, 58, 64}, make([]byte, 40)...))
	f.Add([]byte{0x4f, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		flow, _ := packetFlow(b)
		if flow.Src.IsValid() != flow.Dst.IsValid() {
			t.Errorf("%x: %v", b, flow)
		}
	})
}
