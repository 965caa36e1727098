//go:build ignore

// Probe measures, from inside a pod, how long a NetworkPolicy takes from the API call that
// creates or deletes it until the last node has it in force. It asks every server over one UDP
// flow each, once a millisecond, and makes the API calls itself, so that one clock times all.
//
//	probe NAMESPACE ROUNDS ADDRESS:PORT...
//
// The servers are agnhost's netexec, in pods with the label app=server.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	interval = time.Millisecond
	quiet    = 150 * time.Millisecond // no answer to anything sent for so long: closed
	patience = 20 * time.Second
	account  = "/var/run/secrets/kubernetes.io/serviceaccount/"
	policy   = `{"apiVersion":"networking.k8s.io/v1","kind":"NetworkPolicy","metadata":{"name":"figures"},
"spec":{"podSelector":{"matchLabels":{"app":"server"}},"policyTypes":["Ingress"]}}`
)

// flow is one server, asked all the time.
type flow struct {
	mu       sync.Mutex
	answered time.Time // when the last packet was sent that was answered
	opened   time.Time // when the first one was, after since
	since    time.Time
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 3 {
		return fmt.Errorf("usage: probe NAMESPACE ROUNDS ADDRESS:PORT...")
	}
	rounds, err := strconv.Atoi(args[1])
	if err != nil {
		return fmt.Errorf("rounds: %w", err)
	}
	api, err := newAPI(args[0])
	if err != nil {
		return err
	}
	var flows []*flow
	for _, a := range args[2:] {
		f, err := ask(a)
		if err != nil {
			return err
		}
		flows = append(flows, f)
	}
	var closed, closedAnswer, opened []time.Duration
	for range rounds {
		if err := until(func() bool { return all(flows, (*flow).open) }); err != nil {
			return fmt.Errorf("wait for open servers: %w", err)
		}
		began := time.Now()
		if err := api.call(http.MethodPost, "", policy); err != nil {
			return err
		}
		answer := time.Now()
		if err := until(func() bool { return all(flows, func(f *flow) bool { return !f.open() }) }); err != nil {
			return fmt.Errorf("wait for closed servers: %w", err)
		}
		last := latest(flows, func(f *flow) time.Time { return f.answered })
		closed = append(closed, last.Add(interval).Sub(began))
		closedAnswer = append(closedAnswer, max(0, last.Add(interval).Sub(answer)))

		began = time.Now()
		for _, f := range flows {
			f.watch(began)
		}
		if err := api.call(http.MethodDelete, "/figures", ""); err != nil {
			return err
		}
		if err := until(func() bool { return all(flows, func(f *flow) bool { return !f.first().IsZero() }) }); err != nil {
			return fmt.Errorf("wait for open servers: %w", err)
		}
		opened = append(opened, latest(flows, (*flow).first).Sub(began))
	}
	report("create sent -> enforced on all nodes", closed)
	report("create answered -> enforced on all nodes", closedAnswer)
	report("delete sent -> open on all nodes", opened)
	return nil
}

// ask sends to a server once a millisecond, and keeps the books of what was answered.
func ask(address string) (*flow, error) {
	c, err := net.Dial("udp", address)
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", address, err)
	}
	f := new(flow)
	go func() {
		for range time.Tick(interval) {
			fmt.Fprintf(c, "echo %d", time.Now().UnixNano())
		}
	}()
	go func() {
		b := make([]byte, 256)
		for {
			n, err := c.Read(b)
			if err != nil {
				continue // refused while the server starts
			}
			nanos, err := strconv.ParseInt(strings.TrimSpace(string(b[:n])), 10, 64)
			if err == nil {
				f.got(time.Unix(0, nanos))
			}
		}
	}()
	return f, nil
}

func (f *flow) got(sent time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if sent.After(f.answered) {
		f.answered = sent
	}
	if f.opened.IsZero() && !f.since.IsZero() && sent.After(f.since) {
		f.opened = sent
	}
}

func (f *flow) watch(since time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.since, f.opened = since, time.Time{}
}

func (f *flow) first() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.opened
}

func (f *flow) open() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Since(f.answered) < quiet
}

func all(flows []*flow, is func(*flow) bool) bool {
	return !slices.ContainsFunc(flows, func(f *flow) bool { return !is(f) })
}

func latest(flows []*flow, when func(*flow) time.Time) time.Time {
	var t time.Time
	for _, f := range flows {
		if w := when(f); w.After(t) {
			t = w
		}
	}
	return t
}

func until(is func() bool) error {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(interval) {
		if is() {
			return nil
		}
	}
	return fmt.Errorf("not within %s", patience)
}

func report(what string, d []time.Duration) {
	slices.Sort(d)
	at := func(p int) time.Duration { return d[(len(d)-1)*p/100].Round(100 * time.Microsecond) }
	fmt.Printf("%-42s n %d  p50 %s  p90 %s  p99 %s  max %s\n", what, len(d), at(50), at(90), at(99), at(100))
}

// api writes NetworkPolicies of one namespace as the pod's ServiceAccount.
type api struct {
	client http.Client
	url    string
	token  string
}

func newAPI(namespace string) (*api, error) {
	token, err := os.ReadFile(account + "token")
	if err != nil {
		return nil, fmt.Errorf("read the pod's token: %w", err)
	}
	ca, err := os.ReadFile(account + "ca.crt")
	if err != nil {
		return nil, fmt.Errorf("read the cluster's CA: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	host := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	return &api{
		client: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}},
		url:    "https://" + host + "/apis/networking.k8s.io/v1/namespaces/" + namespace + "/networkpolicies",
		token:  string(token),
	}, nil
}

func (a *api) call(method, path, body string) error {
	r, err := http.NewRequest(method, a.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return fmt.Errorf("%s NetworkPolicy: %w", method, err)
	}
	r.Header.Set("Authorization", "Bearer "+a.token)
	r.Header.Set("Content-Type", "application/json")
	answer, err := a.client.Do(r)
	if err != nil {
		return fmt.Errorf("%s NetworkPolicy: %w", method, err)
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode/100 != 2 {
		return fmt.Errorf("%s NetworkPolicy: %s: %s", method, answer.Status, said)
	}
	return nil
}
