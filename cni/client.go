package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"
)

// ErrNoAgent says that nobody answers on the agent's socket.
var ErrNoAgent = errors.New("the nftcni agent does not answer; start it (systemctl start nftcni-agent) and try again")

// How long a call to the agent may take when the context sets no earlier end. An attach
// waits for the pod to appear in the agent's source, a detach only for the kernel.
const (
	attachTimeout = 30 * time.Second
	detachTimeout = 3 * time.Second
	readyTimeout  = 5 * time.Second
)

// maxAnswer bounds an answer of the agent, in bytes.
const maxAnswer = 1 << 20

// Client calls the agent over its unix socket. It keeps one connection, so that the
// calls of one ADD share it; Close ends it.
type Client struct{ http *http.Client }

// NewClient returns a client of the agent that serves runDir.
func NewClient(runDir string) *Client {
	path := filepath.Join(runDir, SocketName)
	return &Client{http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
			if err != nil {
				return nil, fmt.Errorf("%w (%w)", ErrNoAgent, err)
			}
			return conn, nil
		},
		DisableCompression: true,
		MaxIdleConns:       1,
	}}}
}

// Close ends the connection.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Ready asks whether the agent is ready and what it knows of the node.
func (c *Client) Ready(ctx context.Context) (Ready, error) {
	var r Ready
	err := c.call(ctx, readyTimeout, http.MethodGet, PathReady, nil, &r)
	return r, err
}

// Attach returns when the kernel acknowledged the attachment's policy. An *Error is the
// agent's refusal; errors that match ErrNoAgent mean that there is no agent.
func (c *Client) Attach(ctx context.Context, a Attachment) (AttachResponse, error) {
	var r AttachResponse
	err := c.call(ctx, attachTimeout, http.MethodPost, PathAttach, AttachRequest{a}, &r)
	return r, err
}

// Detach undoes Attach. Errors are those of Attach.
func (c *Client) Detach(ctx context.Context, r DetachRequest) error {
	return c.call(ctx, detachTimeout, http.MethodPost, PathDetach, r, &struct{}{})
}

// Bound asks whether the attachment is bound as it is written here; an *Error of code 3
// says that it is not.
func (c *Client) Bound(ctx context.Context, a Attachment) error {
	return c.call(ctx, readyTimeout, http.MethodPost, PathBound, AttachRequest{a}, &struct{}{})
}

func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return fmt.Errorf("agent request %s: %w", path, err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("agent %s: %w", path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("agent %s: read answer: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("agent %s: %w", path, refusal(resp, b))
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("agent %s: decode answer: %w", path, err)
	}
	return nil
}

func refusal(resp *http.Response, body []byte) *Error {
	e := new(Error)
	if json.Unmarshal(body, e) != nil || e.Message == "" {
		return &Error{Message: resp.Status}
	}
	return e
}
