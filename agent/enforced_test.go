package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/policy"
)

// Whoever waits for a policy waits for the generation that the API server has now, unless
// another is named; a source without generations counts none.
func TestEnforced(t *testing.T) {
	l, ctx := startLoop(t, newMemoryTable(), nil)
	p := denyAll("shop")
	p.Generation = 3
	if err := l.send(ctx, l.replace(&policy.Cluster{Policies: []policy.Policy{p}}, nil)); err != nil {
		t.Fatal(err)
	}
	api := func(_ context.Context, n policy.Name) (int64, error) {
		if n.String() != p.ID.String() {
			return 0, errors.New("read policy: not found")
		}
		return 4, nil
	}
	for _, test := range []struct {
		name, query string
		read        GenerationFunc
		want        Enforced
		status      int
	}{
		{name: "any, waited for", query: "wait=1&policy=" + p.ID.String(), want: Enforced{InForce: true, Known: true, Generation: 3}},
		{name: "of the API server", query: "fresh=1&policy=" + p.ID.String(), read: api, want: Enforced{InForce: true, Known: true, Generation: 3, Wanted: 4}},
		{name: "named", query: "generation=3&policy=" + p.ID.String(), read: api, want: Enforced{InForce: true, Known: true, Generation: 3, Wanted: 3}},
		{name: "manifests", query: "fresh=1&policy=" + p.ID.String(), want: Enforced{InForce: true, Known: true, Generation: 3}},
		{name: "the API server has none", query: "fresh=1&policy=shop/none", read: api, status: http.StatusBadGateway},
		{name: "unknown", query: "policy=shop/none", want: Enforced{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			l.serveEnforced(w, httptest.NewRequestWithContext(ctx, http.MethodGet, PathEnforced+"?"+test.query, nil), test.read)
			if test.status != 0 {
				if w.Code != test.status || !strings.Contains(w.Body.String(), "not found") {
					t.Errorf("%d %s, want %d", w.Code, w.Body, test.status)
				}
				return
			}
			var got Enforced
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if got.InForce != test.want.InForce || got.Known != test.want.Known || got.Generation != test.want.Generation || got.Wanted != test.want.Wanted {
				t.Errorf("%+v, want %+v", got, test.want)
			}
		})
	}
}
