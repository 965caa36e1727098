package k8s

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func token(issued, expires time.Time, bound string) string {
	claims := fmt.Sprintf(`{"iat":%d,"exp":%d,"kubernetes.io":{"namespace":"kube-system","serviceaccount":{"name":"nftcni"}%s}}`,
		issued.Unix(), expires.Unix(), bound)
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".sig"
}

const boundToNode = `,"node":{"name":"n1","uid":"u1"}`

// tokenServer issues tokens and keeps what it was asked for.
func tokenServer(t *testing.T, answer func() (int, string)) (*Cluster, string, *[]string) {
	t.Helper()
	var asked []string
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		spec, err := json.Marshal(body["spec"])
		if err != nil {
			t.Error(err)
		}
		asked = append(asked, r.Method+" "+r.URL.Path+" "+string(spec))
		status, text := answer()
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		fmt.Fprint(w, text)
	}))
	t.Cleanup(srv.Close)
	dir := t.TempDir()
	file := filepath.Join(dir, "token")
	kubeconfig := filepath.Join(dir, "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]\nusers: [{name: u, user: {tokenFile: %q}}]\n"+
		"contexts: [{name: x, context: {cluster: c, user: u}}]\ncurrent-context: x\n", srv.URL, file)
	for path, content := range map[string]string{kubeconfig: text, file: "e30.e30.sig"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := NewCluster(ClusterOptions{Kubeconfig: kubeconfig, Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	return c, file, &asked
}

func TestRenewToken(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	old, young := now.Add(-81*time.Minute), now.Add(-79*time.Minute)
	fresh := token(now, now.Add(100*time.Minute), boundToNode)
	good := func() (int, string) { return http.StatusCreated, `{"status":{"token":"` + fresh + `"}}` }
	request := `POST /api/v1/namespaces/kube-system/serviceaccounts/nftcni/token ` +
		`{"boundObjectRef":{"apiVersion":"v1","kind":"Node","name":"n1","uid":"u1"},"expirationSeconds":6000}`
	for _, row := range []struct {
		name, held string
		age        time.Duration // for how long the process has known it
		answer     func() (int, string)
		asked      []string
		wait       time.Duration
		err        string
	}{
		{"due", token(old, old.Add(100*time.Minute), boundToNode), 0, good, []string{request}, time.Minute, ""},
		{"not yet", token(young, young.Add(100*time.Minute), boundToNode), 0, good, nil, time.Minute, ""},
		{"bound to a pod: the kubelet's", token(old, old.Add(100*time.Minute), `,"pod":{"name":"p"}`+boundToNode), 0, good, nil, time.Hour, ""},
		{"bound to nothing", token(old, old.Add(100*time.Minute), ""), 0, good, nil, time.Hour, ""},
		{"refused", token(old, old.Add(100*time.Minute), boundToNode), 0,
			func() (int, string) { return http.StatusForbidden, `{}` }, []string{request}, 0, "bound to node n1"},
		{"empty answer", token(old, old.Add(100*time.Minute), boundToNode), 0,
			func() (int, string) { return http.StatusCreated, `{}` }, []string{request}, 0, "holds no token"},
		{"no token", "secret", 0, good, nil, 0, "holds no JSON web token"},
		{"hostile token", "a.!!!.c", 0, good, nil, 0, "decode token"},
		{"clock set back a year", token(now.Add(365*24*time.Hour), now.Add(365*24*time.Hour+100*time.Minute), boundToNode), 81 * time.Minute, good, []string{request}, time.Minute, ""},
		{"clock set back, the token is young", token(now.Add(365*24*time.Hour), now.Add(365*24*time.Hour+100*time.Minute), boundToNode), 30 * time.Minute, good, nil, 50 * time.Minute, ""},
		{"clock set forward a year", token(now.Add(-365*24*time.Hour), now.Add(-365*24*time.Hour+100*time.Minute), boundToNode), 0, good, []string{request}, time.Minute, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			c, file, asked := tokenServer(t, row.answer)
			if err := os.WriteFile(file, []byte(row.held), 0o600); err != nil {
				t.Fatal(err)
			}
			wait, err := c.renewToken(t.Context(), now, func(int64) time.Duration { return row.age })
			if wait != row.wait || (err == nil) != (row.err == "") || err != nil && !strings.Contains(err.Error(), row.err) {
				t.Errorf("renewToken = %v, %v; want %v, error with %q", wait, err, row.wait, row.err)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the token: %v", err)
			}
			if d := cmp.Diff(row.asked, *asked); d != "" {
				t.Errorf("asked (-want +got):\n%s", d)
			}
			want := row.held
			if row.asked != nil && row.err == "" {
				want = fresh + "\n"
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != want {
				t.Errorf("file holds %q, %v; want %q", got, err, want)
			}
		})
	}
}
