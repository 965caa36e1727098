package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeAPI is an API server over plain HTTP, as much of one as the agent asks for: list and
// watch of its four resources, patches of pods and nodes, Events.
type fakeAPI struct {
	url string

	mu      sync.Mutex
	changed *sync.Cond
	version int
	objects map[string]object // by resource/namespace/name
	log     []apiChange
	patched map[string]int // by name
	closed  bool
	down    bool // answers 503
}

// object is one in JSON. What is stored is never changed.
type object map[string]any

type apiChange struct {
	version              int
	resource, kind, json string
}

// apiKinds are the resources by name.
func apiKinds() map[string][2]string {
	return map[string][2]string{"namespaces": {"v1", "Namespace"}, "nodes": {"v1", "Node"}, "pods": {"v1", "Pod"},
		"networkpolicies": {"networking.k8s.io/v1", "NetworkPolicy"}}
}

// newFakeAPI serves in the calling process's network namespace until the test ends.
func newFakeAPI(t *testing.T) *fakeAPI {
	t.Helper()
	a := &fakeAPI{objects: map[string]object{}, patched: map[string]int{}, version: 1}
	a.changed = sync.NewCond(&a.mu)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + ln.Addr().String()
	srv := &http.Server{Handler: a, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() {
		a.mu.Lock()
		a.closed = true
		a.changed.Broadcast()
		a.mu.Unlock()
		_ = srv.Close()
	})
	return a
}

// put creates or changes an object; spec and status are JSON, empty for none.
func (a *fakeAPI) put(resource, namespace, name string, labels map[string]string, spec, status string) {
	a.store(resource, namespace, name, object{
		"metadata": map[string]any{"namespace": namespace, "name": name, "labels": labels, "uid": apiUID(name)},
		"spec":     rawJSON(spec), "status": rawJSON(status),
	})
}

func rawJSON(s string) json.RawMessage {
	if s == "" {
		return json.RawMessage("{}")
	}
	return json.RawMessage(s)
}

// apiUID is the UID of the object of a name.
func apiUID(name string) string { return "00000000-0000-4000-8000-" + name }

func (a *fakeAPI) store(resource, namespace, name string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := resource + "/" + namespace + "/" + name
	kind := "ADDED"
	if _, ok := a.objects[key]; ok {
		kind = "MODIFIED"
	}
	a.objects[key] = o
	a.note(resource, kind, o)
}

// putMirror lists a static pod.
func (a *fakeAPI) putMirror(namespace, name, uid string, labels map[string]string) {
	a.store("pods", namespace, name, object{
		"metadata": map[string]any{"namespace": namespace, "name": name, "labels": labels, "uid": apiUID(name),
			"annotations": map[string]string{"kubernetes.io/config.hash": uid, "kubernetes.io/config.mirror": uid}},
		"spec": rawJSON(`{"nodeName": "demo", "containers": [{"name": "main"}]}`), "status": rawJSON(`{"phase": "Running"}`),
	})
}

// setDown ends every watch and refuses everything, or serves again.
func (a *fakeAPI) setDown(down bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.down = down
	a.changed.Broadcast()
}

func (a *fakeAPI) isDown() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.down
}

func (a *fakeAPI) remove(resource, namespace, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	key := resource + "/" + namespace + "/" + name
	if o, ok := a.objects[key]; ok {
		delete(a.objects, key)
		a.note(resource, "DELETED", o)
	}
}

// note logs a change of o, which becomes the newest version.
func (a *fakeAPI) note(resource, kind string, o object) {
	a.version++
	k := apiKinds()[resource]
	o["apiVersion"], o["kind"] = k[0], k[1]
	o["metadata"].(map[string]any)["resourceVersion"] = strconv.Itoa(a.version)
	a.log = append(a.log, apiChange{a.version, resource, kind, mustJSON(o)})
	a.changed.Broadcast()
}

func mustJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (a *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	last := parts[len(parts)-1]
	q := r.URL.Query()
	switch {
	case a.isDown():
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"ServiceUnavailable","message":"down","code":503}`)
	case r.Method == http.MethodPatch:
		a.patch(w, r, parts[2:])
	case r.Method == http.MethodPost:
		w.WriteHeader(http.StatusCreated)
		_, _ = io.Copy(w, r.Body)
	case q.Get("sendInitialEvents") != "": // as servers without WatchList
		w.WriteHeader(http.StatusUnprocessableEntity)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Invalid","message":"sendInitialEvents is forbidden","code":422}`)
	case q.Get("watch") != "":
		from, _ := strconv.Atoi(q.Get("resourceVersion"))
		a.watch(w, r, last, from)
	default:
		a.list(w, last)
	}
}

func (a *fakeAPI) list(w io.Writer, resource string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var items []object
	for key, o := range a.objects {
		if strings.HasPrefix(key, resource+"/") {
			items = append(items, o)
		}
	}
	k := apiKinds()[resource]
	fmt.Fprint(w, mustJSON(object{"apiVersion": k[0], "kind": k[1] + "List", "items": items,
		"metadata": map[string]any{"resourceVersion": strconv.Itoa(a.version)}}))
}

func (a *fakeAPI) watch(w http.ResponseWriter, r *http.Request, resource string, from int) {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-r.Context().Done():
			a.changed.Broadcast()
		case <-stop:
		}
	}()
	w.(http.Flusher).Flush()
	for at := 0; ; {
		a.mu.Lock()
		for at == len(a.log) && !a.closed && !a.down && r.Context().Err() == nil {
			a.changed.Wait()
		}
		news, over := a.log[at:], a.closed || a.down || r.Context().Err() != nil
		at = len(a.log)
		a.mu.Unlock()
		if over {
			return
		}
		for _, c := range news {
			if c.version > from && c.resource == resource {
				fmt.Fprintf(w, `{"type":%q,"object":%s}`+"\n", c.kind, c.json)
			}
		}
		w.(http.Flusher).Flush()
	}
}

// patch takes annotations, of namespaces NS pods NAME or of nodes NAME.
func (a *fakeAPI) patch(w io.Writer, r *http.Request, parts []string) {
	var p struct {
		Metadata struct {
			Annotations map[string]*string `json:"annotations"`
		} `json:"metadata"`
	}
	_ = json.NewDecoder(r.Body).Decode(&p)
	name := parts[len(parts)-1]
	key := "nodes//" + name
	if len(parts) == 4 {
		key = "pods/" + parts[1] + "/" + name
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.patched[name]++
	o, ok := a.objects[key]
	if !ok {
		w.(http.ResponseWriter).WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
		return
	}
	next, meta := object{}, map[string]any{}
	for k, v := range o {
		next[k] = v
	}
	for k, v := range o["metadata"].(map[string]any) {
		meta[k] = v
	}
	meta["annotations"] = p.Metadata.Annotations
	next["metadata"] = meta
	resource, _, _ := strings.Cut(key, "/")
	a.objects[key] = next
	a.note(resource, "MODIFIED", next)
	fmt.Fprint(w, mustJSON(next))
}
