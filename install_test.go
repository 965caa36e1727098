package main

import (
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/agent"
)

// TestConfigFileNamesEverySetting keeps deploy/files/agent.yaml equal to agent.Config: every field stands
// there commented, and with the comment signs removed the agent accepts it.
func TestConfigFileNamesEverySetting(t *testing.T) {
	b, err := os.ReadFile("deploy/files/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	setting := regexp.MustCompile(`(?m)^# ([a-zA-Z]+): `)
	active := setting.ReplaceAllString(string(b), "$1: ")
	for field := range reflect.TypeFor[agent.Config]().Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		if !strings.Contains(active, "\n"+name+": ") {
			t.Errorf("deploy/files/agent.yaml does not name setting %s", name)
		}
	}
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, []byte(active), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.LoadConfig(path); err != nil {
		t.Errorf("every setting at once: %v", err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.LoadConfig(path); err != nil {
		t.Errorf("the file as it is installed: %v", err)
	}
}

// TestNotifySystemd receives what systemd would.
func TestNotifySystemd(t *testing.T) {
	if err := notifySystemd("READY=1"); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
	socket := listenNotify(t)
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := storeTableSocket(f); err != nil {
		t.Fatal(err)
	}
	data, rights := make([]byte, 256), make([]byte, 256)
	n, oobn, _, _, err := socket.ReadMsgUnix(data, rights)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(data[:n]), "FDSTORE=1\nFDPOLL=0\nFDNAME=nftcni-table"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if oobn == 0 {
		t.Error("no descriptor came with it")
	}
}

func listenNotify(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}
