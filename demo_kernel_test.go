package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// insideNode marks the process that a test re-executed in namespaces of its own.
const insideNode = "NFTCNI_TEST_INSIDE_NODE"

// TestMain lets the test binary stand for the product: started under the name nftcni
// it is nftcni, so that tests execute the real plugin and agent without a build.
func TestMain(m *testing.M) {
	if step := os.Getenv(envFault); step != "" && os.Getenv("CNI_COMMAND") != "" {
		os.Exit(pluginUnderFault(step))
	}
	if filepath.Base(os.Args[0]) == "nftcni" || os.Getenv("CNI_COMMAND") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// inFreshNode runs f in a process with network and mount namespaces of its own (and a
// user namespace unless root): the test binary again, with this test alone.
func inFreshNode(t *testing.T, f func(*testing.T)) {
	t.Helper()
	if os.Getenv(insideNode) == t.Name() {
		if err := privateRun(); err != nil {
			t.Fatal(err)
		}
		f(t)
		return
	}
	only := "^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$"
	args := []string{"-test.run=" + only, "-test.v", "-test.timeout=5m"}
	if *update {
		args = append(args, "-update")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), insideNode+"="+t.Name())
	cmd.SysProcAttr = nodeNamespaces()
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) {
		t.Skipf("user namespaces: this system does not let user %d make one (%v)", os.Geteuid(), err)
	}
	if err != nil {
		t.Fatalf("in namespaces of its own: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}
