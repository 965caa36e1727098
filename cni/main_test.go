package cni

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	envNode  = "NFTCNI_TEST_NODE"  // "yes": this process is in a network namespace of its own; else why not
	envFault = "NFTCNI_TEST_FAULT" // step after which the plugin kills itself
	// envPlugin is the product's binary, to measure it instead of this one.
	envPlugin = "NFTCNI_TEST_PLUGIN"
)

// TestMain lets the test binary play two more parts: the node, by starting itself again
// in fresh namespaces, and the plugin, when libcni runs it under the plugin's name.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "nftcni":
		p := NewPlugin()
		p.AfterStep = killAfter(os.Getenv(envFault))
		os.Exit(p.Run(context.Background()))
	case "nftcni-ipam":
		os.Exit(NewPlugin().RunIPAM(context.Background()))
	}
	if os.Getenv(envNode) == "" {
		// Before the node, which has no way out: the module cache or the proxy has them.
		if err := installReference(); err != nil {
			fmt.Fprintln(os.Stderr, "reference plugins:", err)
		}
		os.Exit(runAsNode())
	}
	os.Exit(m.Run())
}

func killAfter(step string) func(string) {
	if step == "" {
		return nil
	}
	return func(done string) {
		if done == step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
}

func runAsNode() int {
	run := func(flags uintptr, why string) (int, error) {
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Args[0] = os.Args[0]
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.Env = append(os.Environ(), envNode+"="+why)
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
		if flags&syscall.CLONE_NEWUSER != 0 {
			c.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
			c.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		}
		if err := c.Start(); err != nil {
			return 0, err
		}
		_ = c.Wait()
		return c.ProcessState.ExitCode(), nil
	}
	flags := uintptr(syscall.CLONE_NEWNET | syscall.CLONE_NEWNS)
	if os.Geteuid() != 0 {
		flags |= syscall.CLONE_NEWUSER
	}
	code, err := run(flags, "yes")
	if err != nil {
		code, err = run(0, "no network namespace: "+err.Error())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// needNode skips a kernel test where no namespaces can be made.
func needNode(t testing.TB) {
	t.Helper()
	if why := os.Getenv(envNode); why != "yes" {
		t.Skip(why)
	}
}

// node is a node with a fake agent: run and state directories, a plugin path, libcni.
type node struct {
	t                    testing.TB
	run, state, bin, dir string
	agent                *fakeAgent
	cni                  *libcni.CNIConfig
}

func newNode(t testing.TB) *node {
	t.Helper()
	needNode(t)
	dir, err := os.MkdirTemp("/tmp", "cni") // a socket's path has 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, run: dir + "/run", state: dir + "/state", bin: dir + "/bin"}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, d := range []string{n.run, n.bin, dir + "/netns"} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if real := os.Getenv(envPlugin); real != "" {
		self = real
	}
	for _, name := range []string{"nftcni", "nftcni-ipam"} {
		if err := os.Symlink(self, filepath.Join(n.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte("1"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// libcni makes its own executor when it is first needed, which parallel calls race for.
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{n.bin}, dir+"/cache", pluginExec(os.Stderr))
	n.agent = startAgent(t, n.run)
	return n
}

// fakeAgent is the agent's side of the socket.
type fakeAgent struct {
	mu       sync.Mutex
	ready    Ready
	refuse   map[string]*Error // path -> answer
	attached map[string]Attachment
	onAttach func(Attachment) // called before the answer
	srv      *http.Server
	run      string
}

func startAgent(t testing.TB, run string) *fakeAgent {
	t.Helper()
	a := &fakeAgent{run: run, ready: Ready{Ready: true, MTU: 1450}, refuse: map[string]*Error{}, attached: map[string]Attachment{}}
	a.start(t)
	t.Cleanup(func() { a.stop() })
	return a
}

func (a *fakeAgent) start(t testing.TB) {
	t.Helper()
	path := filepath.Join(a.run, SocketName)
	_ = os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	a.srv = &http.Server{Handler: a, ReadHeaderTimeout: time.Minute}
	go func() { _ = a.srv.Serve(ln) }()
}

func (a *fakeAgent) stop() { _ = a.srv.Close() }

func (a *fakeAgent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if e := a.refuse[r.URL.Path]; e != nil {
		w.WriteHeader(http.StatusConflict)
		_ = json.NewEncoder(w).Encode(e)
		return
	}
	var out any = struct{}{}
	switch r.URL.Path {
	case PathReady:
		out = a.ready
	case PathAttach:
		var req AttachRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		if a.onAttach != nil {
			a.onAttach(req.Attachment)
		}
		a.attached[req.HostInterface] = req.Attachment
		out = AttachResponse{Generation: 1}
	case PathDetach:
		var req DetachRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		delete(a.attached, req.HostInterface)
	case PathBound:
		var req AttachRequest
		_ = json.NewDecoder(r.Body).Decode(&req)
		if have, ok := a.attached[req.HostInterface]; !ok || !slices.Equal(have.Addresses, req.Addresses) {
			w.WriteHeader(http.StatusConflict)
			out = &Error{Code: types.ErrUnknownContainer, Message: "not bound"}
		}
	}
	_ = json.NewEncoder(w).Encode(out)
}

func (a *fakeAgent) bound() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.attached)
}

// pod makes a network namespace, known by a path as runtimes do it.
func (n *node) pod(name string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, "netns", name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		n.t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			return unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
		}()
	}()
	if err := <-done; err != nil {
		n.t.Fatalf("make pod namespace: %v", err)
	}
	n.t.Cleanup(func() { n.kill(name) })
	return path
}

// kill ends a pod's namespace behind the plugin's back, and waits for its links to go.
func (n *node) kill(name string) {
	path := filepath.Join(n.dir, "netns", name)
	_ = unix.Unmount(path, unix.MNT_DETACH)
	_ = os.Remove(path)
}

// list makes a configuration list of one plugin of ours; extra is merged into it.
func (n *node) list(version string, extra string) *libcni.NetworkConfigList {
	n.t.Helper()
	return n.chain("testnet", version, n.plugin(extra))
}

func (n *node) plugin(extra string) string {
	conf := map[string]any{"type": "nftcni", "runDir": n.run, "stateDir": n.state}
	if err := json.Unmarshal([]byte(extra), &conf); err != nil {
		n.t.Fatalf("%s: %v", extra, err)
	}
	b, err := json.Marshal(conf)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

func (n *node) chain(name, version string, plugins ...string) *libcni.NetworkConfigList {
	n.t.Helper()
	l, err := libcni.NetworkConfFromBytes([]byte(fmt.Sprintf(`{"cniVersion":%q,"name":%q,"plugins":[%s]}`, version, name, strings.Join(plugins, ","))))
	if err != nil {
		n.t.Fatal(err)
	}
	return l
}

func (n *node) runtime(id, netnsPath string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: netnsPath, IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "default"}, {"K8S_POD_NAME", id}, {"K8S_POD_UID", "uid-" + id}}}
}

func (n *node) add(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) (*current.Result, error) {
	res, err := n.cni.AddNetworkList(n.t.Context(), l, rt)
	if err != nil {
		return nil, err
	}
	return current.NewResultFromResult(res)
}

func (n *node) mustAdd(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) *current.Result {
	n.t.Helper()
	res, err := n.add(l, rt)
	if err != nil {
		n.t.Fatalf("ADD %s: %v", rt.ContainerID, err)
	}
	return res
}

func (n *node) mustDel(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) {
	n.t.Helper()
	if err := n.cni.DelNetworkList(context.Background(), l, rt); err != nil {
		n.t.Errorf("DEL %s: %v", rt.ContainerID, err)
	}
}

func (n *node) snapshot() string {
	n.t.Helper()
	s, err := TakeSnapshot(context.Background(), n.run, n.state)
	if err != nil {
		n.t.Fatal(err)
	}
	return s.String() + fmt.Sprintln("bound", n.agent.bound())
}

// same waits for the node to look as it did: a namespace that was let go takes its links
// down in the background. It does not poll on a clock but on the kernel's link events.
func (n *node) same(what, before string) {
	n.t.Helper()
	after := n.snapshot()
	for range 200 {
		if after == before {
			return
		}
		n.settle()
		after = n.snapshot()
	}
	n.t.Errorf("%s left something (-before +after):\n%s", what, cmp.Diff(strings.Split(before, "\n"), strings.Split(after, "\n")))
}

// settle waits for the kernel to be done with a namespace: making and closing one passes
// through the same work queue.
func (n *node) settle() {
	c := exec.Command("/bin/true")
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	_ = c.Run()
}

// code is the CNI error code of an error from libcni.
func code(err error) uint {
	var e *types.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return 0
}

// inside runs fn in the namespace at path.
func inside(t testing.TB, path string, fn func() error) {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := inNetNS(ns, fn); err != nil {
		t.Error(err)
	}
}

// talk sends a line from one pod to an address of another and expects it back.
func (n *node) talk(from, to, address string) {
	n.t.Helper()
	var ln net.Listener
	inside(n.t, to, func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(address, "7"))
		return err
	})
	if ln == nil {
		return
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err == nil {
			line, _ := bufio.NewReader(c).ReadBytes('\n')
			_, _ = c.Write(line)
			_ = c.Close()
		}
	}()
	inside(n.t, from, func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(address, "7"), 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_, _ = c.Write([]byte("hello\n"))
		if line, err := bufio.NewReader(c).ReadBytes('\n'); !bytes.Equal(line, []byte("hello\n")) {
			return fmt.Errorf("got %q, %w", line, err)
		}
		return nil
	})
}

func podHandle(t testing.TB, path string) *netlink.Handle {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// pluginExec runs plugins without libcni's environment lookups.
func pluginExec(stderr io.Writer) invoke.Exec {
	return &struct {
		*invoke.RawExec
		version.PluginDecoder
	}{RawExec: &invoke.RawExec{Stderr: stderr}}
}
