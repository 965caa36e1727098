package k8s

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// apiServer serves list, watch and WatchList of our four resources, takes patches of
// pods and creations of Events, and can be told to fail.
type apiServer struct {
	*httptest.Server
	watchList bool // serve sendInitialEvents

	mu      sync.Mutex
	changed *sync.Cond
	version int
	objects map[string]metav1.Object // by resource/namespace/name
	log     []change                 // everything since compact
	compact int                      // versions up to this one are forgotten
	epoch   int                      // incremented to cut every watch
	down    bool
	patches []string
	events  []corev1.Event
	lists   int
}

type change struct {
	version  int
	resource string
	kind     string // ADDED, MODIFIED, DELETED
	object   []byte
}

func newAPIServer(t *testing.T, watchList bool) *apiServer {
	s := &apiServer{watchList: watchList, objects: map[string]metav1.Object{}, version: 10}
	s.changed = sync.NewCond(&s.mu)
	s.Server = httptest.NewUnstartedServer(s)
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that leave during a handshake
	s.StartTLS()                                   // client-go sends no credentials in the clear
	t.Cleanup(func() {
		s.cut()
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// kubeconfig writes one that leads to this server.
func (s *apiServer) kubeconfig(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	ca := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	write(t, path, "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"+
		"clusters: [{name: c, cluster: {server: "+s.URL+", certificate-authority-data: "+ca+"}}]\nusers: [{name: u, user: {token: secret}}]\n")
	return path
}

func (s *apiServer) source(t *testing.T) *Cluster {
	c, err := NewCluster(ClusterOptions{Kubeconfig: s.kubeconfig(t), Node: "n1"})
	must(t, err)
	return c
}

func gvk(o metav1.Object) (apiVersion, kind, resource string) {
	switch o.(type) {
	case *corev1.Namespace:
		return "v1", "Namespace", "namespaces"
	case *corev1.Node:
		return "v1", "Node", "nodes"
	case *corev1.Pod:
		return "v1", "Pod", "pods"
	}
	return "networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"
}

// put creates or changes objects.
func (s *apiServer) put(objects ...metav1.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range objects {
		apiVersion, kind, resource := gvk(o)
		key := resource + "/" + o.GetNamespace() + "/" + o.GetName()
		event := "ADDED"
		if _, ok := s.objects[key]; ok {
			event = "MODIFIED"
		}
		s.version++
		o.SetResourceVersion(strconv.Itoa(s.version))
		if o.GetUID() == "" {
			o.SetUID("uid-of-" + metav1.ObjectMeta{Name: o.GetName()}.UID)
		}
		o.(runtime.Object).GetObjectKind().SetGroupVersionKind(schemaGVK(apiVersion, kind))
		s.objects[key] = o
		s.note(event, resource, o)
	}
}

func (s *apiServer) remove(resource, namespace, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := resource + "/" + namespace + "/" + name
	o := s.objects[key]
	delete(s.objects, key)
	s.version++
	o.SetResourceVersion(strconv.Itoa(s.version))
	s.note("DELETED", resource, o)
}

func (s *apiServer) note(event, resource string, o any) {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	s.log = append(s.log, change{s.version, resource, event, b})
	s.changed.Broadcast()
}

// cut ends every watch; forget makes the server answer 410 to those that come back.
func (s *apiServer) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.epoch++
	s.changed.Broadcast()
}

func (s *apiServer) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.compact, s.log = s.version, nil
}

func (s *apiServer) setDown(down bool) {
	s.mu.Lock()
	s.down = down
	s.mu.Unlock()
	if down {
		s.cut()
	}
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	resource := parts[len(parts)-1]
	s.mu.Lock()
	down := s.down
	s.mu.Unlock()
	switch {
	case down:
		status(w, http.StatusServiceUnavailable, "ServiceUnavailable", "down")
	case r.Header.Get("Authorization") != "Bearer secret":
		status(w, http.StatusUnauthorized, "Unauthorized", "who are you")
	case r.Method == http.MethodPatch:
		s.patch(w, r)
	case r.Method == http.MethodPost && resource == "events":
		s.postEvent(w, r)
	case r.Method == http.MethodGet && r.URL.Query().Get("watch") != "":
		s.watch(w, r, resource)
	case len(parts) > 1 && parts[len(parts)-2] == "networkpolicies":
		s.get(w, "networkpolicies/"+parts[len(parts)-3]+"/"+resource)
	default:
		s.list(w, resource)
	}
}

func status(w http.ResponseWriter, code int, reason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"message":%q,"code":%d}`, reason, message, code)
}

func (s *apiServer) get(w http.ResponseWriter, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[key]
	if !ok {
		status(w, http.StatusNotFound, "NotFound", key)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(o); err != nil {
		panic(err)
	}
}

func (s *apiServer) list(w http.ResponseWriter, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lists++
	kinds := map[string]string{"namespaces": "v1 NamespaceList", "nodes": "v1 NodeList", "pods": "v1 PodList", "networkpolicies": "networking.k8s.io/v1 NetworkPolicyList"}
	apiVersion, kind, _ := strings.Cut(kinds[resource], " ")
	items := []any{}
	for key, o := range s.objects {
		if strings.HasPrefix(key, resource+"/") {
			items = append(items, o)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	err := json.NewEncoder(w).Encode(map[string]any{"apiVersion": apiVersion, "kind": kind,
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version)}, "items": items})
	if err != nil {
		panic(err)
	}
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, resource string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	initial := r.URL.Query().Get("sendInitialEvents") == "true"
	if initial && !s.watchList {
		status(w, http.StatusUnprocessableEntity, "Invalid", "sendInitialEvents is forbidden")
		return
	}
	if !initial && from < s.compact {
		status(w, http.StatusGone, "Expired", "too old resource version")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	send := func(event string, object []byte) {
		fmt.Fprintf(w, `{"type":%q,"object":%s}`+"\n", event, object)
	}
	if initial {
		from = s.version
		for key, o := range s.objects {
			if strings.HasPrefix(key, resource+"/") {
				b, _ := json.Marshal(o)
				send("ADDED", b)
			}
		}
		examples := map[string]string{"namespaces": "v1 Namespace", "nodes": "v1 Node", "pods": "v1 Pod", "networkpolicies": "networking.k8s.io/v1 NetworkPolicy"}
		apiVersion, kind, _ := strings.Cut(examples[resource], " ")
		send("BOOKMARK", fmt.Appendf(nil, `{"apiVersion":%q,"kind":%q,"metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}`, apiVersion, kind, s.version))
	}
	stop := contextBroadcast(r, s.changed)
	defer stop()
	for epoch := s.epoch; epoch == s.epoch && r.Context().Err() == nil; s.changed.Wait() {
		for _, c := range s.log {
			if c.version > from && c.resource == resource {
				send(c.kind, c.object)
			}
		}
		from = s.version
		w.(http.Flusher).Flush()
	}
}

func (s *apiServer) patch(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/") // api v1 namespaces NS pods NAME, or api v1 nodes NAME
	if parts[2] == "nodes" {
		s.patchNode(w, parts[3], body)
		return
	}
	s.mu.Lock()
	o, ok := s.objects["pods/"+parts[3]+"/"+parts[5]].(*corev1.Pod)
	s.patches = append(s.patches, string(body))
	s.mu.Unlock()
	var p struct {
		Metadata struct {
			UID         string
			Annotations map[string]*string
		}
	}
	switch err := json.Unmarshal(body, &p); {
	case err != nil || r.Header.Get("Content-Type") != "application/merge-patch+json":
		status(w, http.StatusBadRequest, "BadRequest", "bad patch")
	case !ok:
		status(w, http.StatusNotFound, "NotFound", "no such pod")
	case p.Metadata.UID != string(o.UID):
		status(w, http.StatusUnprocessableEntity, "Invalid", "metadata.uid: field is immutable")
	default:
		o = o.DeepCopy()
		o.Annotations = map[string]string{}
		for k, v := range p.Metadata.Annotations {
			if v != nil {
				o.Annotations[k] = *v
			}
		}
		s.put(o)
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(o); err != nil {
			panic(err)
		}
	}
}

func (s *apiServer) patchNode(w http.ResponseWriter, name string, body []byte) {
	s.mu.Lock()
	o, ok := s.objects["nodes//"+name].(*corev1.Node)
	s.patches = append(s.patches, string(body))
	s.mu.Unlock()
	if !ok {
		status(w, http.StatusNotFound, "NotFound", "no such node")
		return
	}
	o = o.DeepCopy()
	if err := json.Unmarshal(body, o); err != nil {
		status(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	s.put(o)
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(o); err != nil {
		panic(err)
	}
}

func (s *apiServer) postEvent(w http.ResponseWriter, r *http.Request) {
	e, err := decodeEvent(r)
	if err != nil {
		status(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	s.mu.Lock()
	s.events = append(s.events, e)
	s.changed.Broadcast()
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	if err := json.NewEncoder(w).Encode(&e); err != nil {
		panic(err)
	}
}

func meta(namespace, name string, pairs ...string) metav1.ObjectMeta {
	m := metav1.ObjectMeta{Namespace: namespace, Name: name}
	if len(pairs) > 0 {
		m.Labels = labels(pairs...).Map()
	}
	return m
}

func apiNamespace(name string, pairs ...string) *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: meta("", name, pairs...)}
}

func apiNode(name string, podCIDRs ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: meta("", name), Spec: corev1.NodeSpec{PodCIDRs: podCIDRs}}
}

func apiPod(namespace, name, node string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: meta(namespace, name), Spec: corev1.PodSpec{NodeName: node}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func apiPolicy(namespace, name string, generation int64) *networkingv1.NetworkPolicy {
	o := &networkingv1.NetworkPolicy{ObjectMeta: meta(namespace, name)}
	o.Generation = generation
	return o
}

func readKubeconfig(t *testing.T, path, old, replacement string) string {
	b, err := os.ReadFile(path)
	must(t, err)
	out := filepath.Join(t.TempDir(), "kubeconfig")
	write(t, out, strings.Replace(string(b), old, replacement, 1))
	return out
}
