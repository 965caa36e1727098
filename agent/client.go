package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/nftcni/nftcni/cni"
)

// Client asks a running agent over its local socket.
type Client struct{ http http.Client }

// NewClient returns a client of the agent that listens on socket.
func NewClient(socket string) *Client {
	return &Client{http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}}
}

// Get fetches one of the paths of status.go into v. The error of an agent that does not
// run is that of the dial (errors.Is ENOENT or ECONNREFUSED).
func (c *Client) Get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, v)
}

// RotateKey asks for a new WireGuard key (PathRotateKey).
func (c *Client) RotateKey(ctx context.Context) (MeshStatus, error) {
	var s MeshStatus
	err := c.do(ctx, http.MethodPost, PathRotateKey, &s)
	return s, err
}

func (c *Client) do(ctx context.Context, method, path string, v any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("ask the agent: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e := &cni.Error{Message: resp.Status}
		_ = json.NewDecoder(resp.Body).Decode(e)
		return fmt.Errorf("ask the agent for %s: %w", path, e)
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("read the agent's answer for %s: %w", path, err)
	}
	return nil
}
