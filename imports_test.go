package main

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const modulePath = "github.com/nftcni/nftcni"

// listedPackage is the part of `go list -json` that the house rules need.
type listedPackage struct {
	ImportPath, Name, Doc, Dir string
	Standard                   bool
	Imports, Deps              []string
}

// folder is the top folder of the package in the module, "main" for the root.
func (p listedPackage) folder() string {
	rest, _ := strings.CutPrefix(p.ImportPath, modulePath+"/")
	if p.ImportPath == modulePath {
		return "main"
	}
	top, _, _ := strings.Cut(rest, "/")
	return top
}

// isTestSupport tells packages like policy/policytest, which only tests import.
func (p listedPackage) isTestSupport() bool { return strings.HasSuffix(p.ImportPath, "test") }

func listPackages(t *testing.T) []listedPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Name,Doc,Dir,Standard,Imports,Deps", "./...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listedPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listedPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// TestImports enforces who may import whom (docs/architecture.md): what, which, who, how and
// wires stay apart, so that each can be read, tested and replaced alone.
func TestImports(t *testing.T) {
	allowed := map[string][]string{
		"policy": nil,
		"ipam":   nil,
		"deploy": nil,
		"nft":    {"policy"},
		"k8s":    {"policy"},
		"cni":    {"ipam"},
		"agent":  {"k8s", "policy", "nft", "cni", "ipam"},
		"debug":  {"agent", "k8s", "policy", "nft", "cni", "ipam", "deploy"},
		"main":   {"agent", "debug", "deploy", "k8s", "policy", "nft", "cni", "ipam"},
	}
	for _, p := range listPackages(t) {
		from := p.folder()
		may, known := allowed[from]
		if !known {
			t.Errorf("%s: folder %s is not in the design", p.ImportPath, from)
			continue
		}
		for _, i := range p.Imports {
			if i != modulePath && !strings.HasPrefix(i, modulePath+"/") {
				continue
			}
			imported := listedPackage{ImportPath: i}
			if imported.isTestSupport() && !p.isTestSupport() {
				t.Errorf("%s imports %s, which is for tests", p.ImportPath, i)
			}
			if to := imported.folder(); to != from && !slices.Contains(may, to) {
				t.Errorf("%s imports %s: %s may import %v", p.ImportPath, i, from, may)
			}
		}
	}
}

// TestDependencies keeps heavy modules out of where they would cost: policy is pure,
// and the plugin starts for every pod.
func TestDependencies(t *testing.T) {
	packages := listPackages(t)
	forbidden := map[string][]string{
		"policy": {"k8s.io/", "github.com/", "golang.org/x/", "sigs.k8s.io/", "net/http", "os/exec"},
		"ipam":   {"k8s.io/", "sigs.k8s.io/", "github.com/spf13/cobra", "net/http"},
		// net/http costs the start of every call (docs/decisions/0024-plugin-before-init.md).
		"cni": {"k8s.io/", "sigs.k8s.io/", "github.com/spf13/cobra", "github.com/google/nftables", "net/http"},
		"nft": {"k8s.io/", "sigs.k8s.io/", "github.com/vishvananda/netlink"},
		// 3 ms of package initialisation that every call of the plugin would pay.
		"main": {"k8s.io/client-go/kubernetes", "github.com/spf13/cobra/doc"},
	}
	for _, p := range packages {
		if p.isTestSupport() {
			continue
		}
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, modulePath) {
				continue
			}
			for _, bad := range forbidden[p.folder()] {
				if strings.HasPrefix(dep, bad) {
					t.Errorf("%s depends on %s", p.ImportPath, dep)
				}
			}
		}
	}
}

// TestPackageDocs wants of every package to say what it is for.
func TestPackageDocs(t *testing.T) {
	for _, p := range listPackages(t) {
		prefix := "Package " + p.Name + " "
		if p.Name == "main" {
			prefix = "Command nftcni "
		}
		if !strings.HasPrefix(p.Doc, prefix) {
			t.Errorf("%s: its documentation begins with %q, want %q", p.ImportPath, p.Doc, prefix)
		}
	}
}
