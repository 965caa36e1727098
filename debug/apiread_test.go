package debug

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/policy"
)

// fakeAPI answers with one Service and one NetworkPolicy, as JSON.
func fakeAPI(t *testing.T) apiFlags {
	t.Helper()
	answers := map[string]string{
		"/api/v1/namespaces/shop/services/db": `{"kind": "Service", "apiVersion": "v1", "metadata": {"name": "db"}, "spec": {"selector": {"app": "db"},
			"ports": [{"protocol": "TCP", "port": 80, "targetPort": "sql"}, {"protocol": "UDP", "port": 53, "targetPort": 5353}]}}`,
		"/apis/networking.k8s.io/v1/namespaces/shop/networkpolicies/db": `{"kind": "NetworkPolicy", "apiVersion": "networking.k8s.io/v1",
			"metadata": {"name": "db", "namespace": "shop", "generation": 7}}`,
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, known := answers[r.URL.Path]
		w.Header().Set("Content-Type", "application/json")
		if !known {
			w.WriteHeader(http.StatusNotFound)
			body = `{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "message": "not found", "code": 404}`
		}
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(srv.Close)
	return apiFlags{server: srv.URL}
}

func TestGeneration(t *testing.T) {
	api := fakeAPI(t)
	if g, err := api.generation(t.Context(), "shop/db"); g != 7 || err != nil {
		t.Errorf("generation %d, error %v, want 7", g, err)
	}
	for _, name := range []string{"shop/none", "db"} {
		if _, err := api.generation(t.Context(), name); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: error %v, want one that names it", name, err)
		}
	}
}

func TestBackends(t *testing.T) {
	c := &policy.Cluster{Pods: []policy.Pod{
		{Name: policy.Name{Namespace: "shop", Name: "db-0"}, Labels: policy.MakeLabels(map[string]string{"app": "db"}),
			Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Ports: []policy.NamedPort{{Name: "sql", Protocol: policy.TCP, Port: 5432}}},
		{Name: policy.Name{Namespace: "shop", Name: "web"}, Labels: policy.MakeLabels(map[string]string{"app": "web"}),
			Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}},
		{Name: policy.Name{Namespace: "other", Name: "db-0"}, Labels: policy.MakeLabels(map[string]string{"app": "db"}),
			Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.3")}},
	}}
	for _, test := range []struct {
		name, service, port, err string
		target                   uint16
	}{
		{name: "named target", service: "shop/db", port: "TCP/80", target: 5432},
		{name: "numeric target", service: "shop/db", port: "UDP/53", target: 5353},
		{name: "no such port", service: "shop/db", port: "TCP/81", err: "it has no port TCP/81, but TCP/80, UDP/53"},
		{name: "no such service", service: "shop/none", port: "TCP/80", err: "read service shop/none"},
		{name: "no namespace", service: "db", port: "TCP/80", err: "svc/NAMESPACE/NAME"},
	} {
		t.Run(test.name, func(t *testing.T) {
			questions, err := newQuestions(context.Background(), c, []string{"shop/web", "svc/" + test.service, test.port}, services{api: fakeAPI(t)})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || len(questions) != 1 || questions[0].dst.name != "shop/db-0" || questions[0].service.port != test.target {
				t.Errorf("%+v, %v; want shop/db-0 port %d", questions, err, test.target)
			}
		})
	}
	if _, err := newQuestions(t.Context(), c, []string{"shop/web", "svc/shop/db", "TCP/80"}, services{}); err == nil || !strings.Contains(err.Error(), "--kubeconfig") {
		t.Errorf("without an API server: %v", err)
	}
}
