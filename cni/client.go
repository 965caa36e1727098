package cni

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoAgent says that nobody answers on the agent's socket.
var ErrNoAgent = errors.New("the nftcni agent does not answer; start it (systemctl start nftcni-agent) and try again")

// errAgentBusy says that somebody listens on the agent's socket and has no time: what the agent has bound is still
// bound, unlike after ErrNoAgent.
var errAgentBusy = errors.New("the nftcni agent has no time to answer; try again")

// How long a call to the agent may take when the context sets no earlier end. An attach
// waits for the pod to appear in the agent's source, a detach only for the kernel.
const (
	attachTimeout = 30 * time.Second
	detachTimeout = 3 * time.Second
	readyTimeout  = 5 * time.Second
)

// maxAnswer bounds an answer of the agent, in bytes.
const maxAnswer = 1 << 20

// Client calls the agent over its unix socket, one connection a call. It speaks HTTP/1.0
// (RFC 1945) by itself: net/http would be initialised in every start of the plugin, and most
// of the agent's own packages with it (docs/decisions/0024).
type Client struct{ socket string }

// NewClient returns a client of the agent that serves runDir.
func NewClient(runDir string) *Client {
	return &Client{socket: filepath.Join(runDir, SocketName)}
}

// Ready asks whether the agent is ready and what it knows of the node.
func (c *Client) Ready(ctx context.Context) (Ready, error) {
	var r Ready
	err := c.call(ctx, readyTimeout, "GET", PathReady, nil, &r)
	return r, err
}

// Attach returns when the kernel acknowledged the attachment's policy. An *Error is the
// agent's refusal; errors that match ErrNoAgent mean that there is no agent.
func (c *Client) Attach(ctx context.Context, a Attachment) (AttachResponse, error) {
	var r AttachResponse
	err := c.call(ctx, attachTimeout, "POST", PathAttach, AttachRequest{a}, &r)
	return r, err
}

// Detach undoes Attach. Errors are those of Attach.
func (c *Client) Detach(ctx context.Context, r DetachRequest) error {
	return c.call(ctx, detachTimeout, "POST", PathDetach, r, &struct{}{})
}

// Bound asks whether the attachment is bound as it is written here; an *Error of code 3
// says that it is not.
func (c *Client) Bound(ctx context.Context, a Attachment) error {
	return c.call(ctx, readyTimeout, "POST", PathBound, AttachRequest{a}, &struct{}{})
}

func (c *Client) call(ctx context.Context, limit time.Duration, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("encode request %s: %w", path, err)
		}
	}
	raw, err := c.exchange(ctx, fmt.Appendf(nil, "%s %s HTTP/1.0\r\nHost: agent\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, path, len(body), body))
	if err != nil {
		return fmt.Errorf("agent %s: %w", path, err)
	}
	a, err := parseAnswer(raw)
	if err != nil {
		return fmt.Errorf("agent %s: %w", path, err)
	}
	if a.code != 200 {
		return fmt.Errorf("agent %s: %w", path, a.refusal())
	}
	if err := json.Unmarshal(a.body, out); err != nil {
		return fmt.Errorf("agent %s: decode answer: %w", path, err)
	}
	return nil
}

// exchange sends a request and reads until the agent closes the connection, which is the
// end of an HTTP/1.0 answer.
func (c *Client) exchange(ctx context.Context, request []byte) ([]byte, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.socket)
	if errors.Is(err, unix.EAGAIN) || err != nil && ctx.Err() != nil { // the queue of connections is full
		return nil, fmt.Errorf("%w (%w)", errAgentBusy, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrNoAgent, err)
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err = conn.Write(request); err != nil {
		err = fmt.Errorf("send request: %w", err)
	}
	answer, readErr := io.ReadAll(io.LimitReader(conn, maxAnswer))
	if len(answer) > 0 && readErr == nil {
		return answer, nil // an agent may refuse without reading everything
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err == nil {
		err = cmp.Or(readErr, io.ErrUnexpectedEOF)
	}
	return nil, fmt.Errorf("read answer: %w", err)
}

// answer is what came back: status code and phrase, and what follows the header, which
// says nothing else of interest.
type answer struct {
	code   int
	status string
	body   []byte
}

func parseAnswer(raw []byte) (answer, error) {
	header, body, ok := bytes.Cut(raw, []byte("\r\n\r\n"))
	line, _, _ := strings.Cut(string(header), "\r\n")
	protocol, status, _ := strings.Cut(line, " ")
	digits, _, _ := strings.Cut(status, " ")
	code, err := strconv.Atoi(digits)
	if !ok || !strings.HasPrefix(protocol, "HTTP/1.") || err != nil {
		return answer{}, fmt.Errorf("%q is no HTTP answer", raw[:min(len(raw), 80)])
	}
	return answer{code: code, status: status, body: body}, nil
}

func (a answer) refusal() *Error {
	e := new(Error)
	if json.Unmarshal(a.body, e) != nil || e.Message == "" {
		return &Error{Message: cmp.Or(a.status, "no status")}
	}
	return e
}
