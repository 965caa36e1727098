package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/cni"
)

// maxRequest bounds what a client of the socket may send, in bytes.
const maxRequest = 1 << 20

// server is the local HTTP API over a unix socket.
type server struct {
	loop *loop
	cfg  Config
	log  *slog.Logger
	mux  *http.ServeMux
	http http.Server
}

func newServer(cfg Config, log *slog.Logger, l *loop) *server {
	mux := http.NewServeMux()
	s := &server{loop: l, cfg: cfg, log: log, mux: mux}
	mux.HandleFunc("POST "+cni.PathAttach, s.attach)
	mux.HandleFunc("POST "+cni.PathDetach, s.detach)
	mux.HandleFunc("POST "+cni.PathBound, s.bound)
	mux.HandleFunc("GET "+cni.PathReady, s.ready)
	mux.HandleFunc("GET "+PathStatus, query(l.status))
	mux.HandleFunc("GET "+PathPods, l.servePods)
	mux.HandleFunc("GET "+PathPolicies, query(l.policies))
	mux.HandleFunc("GET "+PathSnapshot, query(l.snapshot))
	if l.mesh != nil {
		l.mesh.serve(mux)
	}
	s.http = http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return s
}

// listen makes the socket with mode 0600. A socket left by a dead agent is replaced; the
// agent's lock (lock.go) has made sure that no live one holds it.
func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the old socket: %w", err)
	}
	lc := net.ListenConfig{}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("chmod %s: %w", path, err), ln.Close())
	}
	return peerListener{ln}, nil
}

// peerListener accepts only root and the agent's own user, whatever the socket's mode
// became (SO_PEERCRED, unix(7)).
type peerListener struct{ net.Listener }

func (p peerListener) Accept() (net.Conn, error) {
	for {
		c, err := p.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uid, err := peerUID(c); err == nil && (uid == 0 || int(uid) == os.Getuid()) {
			return c, nil
		}
		_ = c.Close()
	}
}

func peerUID(c net.Conn) (uint32, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0, errors.New("not a unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Uid, nil
}

func (s *server) attach(w http.ResponseWriter, r *http.Request) {
	var req cni.AttachRequest
	if !decode(w, r, &req) {
		return
	}
	began := time.Now()
	resp, err := s.loop.attach(r.Context(), req.Attachment)
	s.loop.commits.measures.request("add", time.Since(began), err != nil)
	if err != nil {
		s.log.Warn("attach refused", "pod", podName(req.Attachment).String(), "interface", req.HostInterface, "err", err.Message)
		fail(w, http.StatusConflict, err)
		return
	}
	s.log.Info("attached", "pod", podName(req.Attachment).String(), "interface", req.HostInterface,
		"addresses", req.Addresses, "micros", resp.Micros)
	reply(w, resp)
}

func (s *server) detach(w http.ResponseWriter, r *http.Request) {
	var req cni.DetachRequest
	if !decode(w, r, &req) {
		return
	}
	began := time.Now()
	err := s.loop.detach(r.Context(), req)
	s.loop.commits.measures.request("del", time.Since(began), err != nil)
	if err != nil {
		fail(w, http.StatusServiceUnavailable, err)
		return
	}
	reply(w, struct{}{})
}

// bound answers CHECK: whether the attachment is in force with this content.
func (s *server) bound(w http.ResponseWriter, r *http.Request) {
	var req cni.AttachRequest
	if !decode(w, r, &req) {
		return
	}
	if err := s.loop.bound(r.Context(), req.Attachment); err != nil {
		fail(w, http.StatusNotFound, err)
		return
	}
	reply(w, struct{}{})
}

func (s *server) ready(w http.ResponseWriter, r *http.Request) {
	out := cni.Ready{MTU: s.cfg.MTU}
	if out.MTU == 0 && s.loop.mesh != nil {
		out.MTU = s.loop.mesh.cni.MTU()
	}
	err := s.loop.do(r.Context(), func() {
		out.Ready, out.Reason = s.loop.ready()
		out.Limited = s.loop.broken != nil
		out.PodCIDRs = s.loop.inv.ownPodCIDRs(s.cfg.PodCIDRs)
	})
	if err != nil {
		fail(w, http.StatusServiceUnavailable, tryAgain("ready: %v", err))
		return
	}
	reply(w, out)
}

func query[T any](get func(context.Context) (T, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := get(r.Context())
		if err != nil {
			fail(w, http.StatusServiceUnavailable, tryAgain("%s: %v", r.URL.Path, err))
			return
		}
		reply(w, v)
	}
}

func decode(w http.ResponseWriter, r *http.Request, into any) bool {
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(into)
	if err != nil {
		fail(w, http.StatusBadRequest, &cni.Error{Code: codeDecode, Message: fmt.Sprintf("decode %s: %v", r.URL.Path, err)})
	}
	return err == nil
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}

func fail(w http.ResponseWriter, status int, err *cni.Error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(err)
}
