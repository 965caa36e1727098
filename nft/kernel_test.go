package nft_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nftcni/nftcni/nft"
	"github.com/nftcni/nftcni/nft/nfttest"
	"github.com/nftcni/nftcni/policy"
)

func TestMain(m *testing.M) { nfttest.Main(m) }

// namespace moves the test's thread into a fresh network namespace for good: the thread is never unlocked.
func namespace(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("no network namespace: %v", err)
	}
}

func nftList(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "table", "inet", nft.TableName).CombinedOutput()
	if err != nil {
		t.Fatalf("nft list: %v\n%s", err, out)
	}
	return string(out)
}

func nftFile(t *testing.T, text string) {
	t.Helper()
	f := filepath.Join(t.TempDir(), "rules.nft")
	if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("nft", "-f", f).CombinedOutput(); err != nil {
		t.Fatalf("nft -f: %v\n%s", err, out)
	}
}

func needNft(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("no nft command here")
	}
}

func open(t *testing.T, o nft.Options) *nft.Table {
	t.Helper()
	table, err := nft.Open(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = table.Close() })
	return table
}

func TestGoldenProgram(t *testing.T) {
	const golden = "testdata/program.nft"
	if os.Getenv("NFTCNI_UPDATE") != "" {
		if err := os.WriteFile(golden, []byte(nft.Program()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if nft.Program() != string(want) {
		t.Errorf("Program differs from %s: run with NFTCNI_UPDATE=1 and read the difference", golden)
	}
}

// TestKernelTextAndBytes is what keeps the two printers of a statement together.
func TestKernelTextAndBytes(t *testing.T) {
	needNft(t)
	namespace(t)
	nftFile(t, nft.Program())
	text := nftList(t)
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	table := open(t, nft.Options{})
	s, err := table.State(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	bytes := nftList(t)
	for _, line := range strings.Split(bytes, "\n") {
		if strings.Contains(line, "elements = {") && strings.Contains(line, "0x") {
			bytes = strings.Replace(bytes, line+"\n", "", 1)
		}
	}
	if text != bytes {
		t.Errorf("text and bytes are not the same rules\n--- text\n%s\n--- bytes\n%s", text, bytes)
	}
	if s.Epoch&0x8000c000 != 0x80000000 {
		t.Errorf("first epoch %#x", s.Epoch)
	}
}

func testElements() []policy.Op {
	a := netip.MustParseAddr
	var ops []policy.Op
	add := func(k policy.Key, v uint32, c string) {
		ops = append(ops, policy.Op{Element: policy.Element{Key: k, Value: v, Comment: c}})
	}
	for i, addr := range []string{"10.1.0.1", "fd00::1", "10.1.0.2"} {
		add(policy.Key{Map: policy.PodID, Addr: a(addr)}, 0x10000+uint32(i), "shop/web-"+addr)
		add(policy.Key{Map: policy.IngressProfile, Addr: a(addr)}, 0x20000001, "shop/\"web\"")
		add(policy.Key{Map: policy.EgressProfile, Addr: a(addr)}, 0x10000001, "")
		add(policy.Key{Map: policy.IsolatedIngress, Addr: a(addr)}, 0, "shop/web")
		add(policy.Key{Map: policy.IsolatedEgress, Addr: a(addr)}, 0, "")
	}
	add(policy.Key{Map: policy.NetID, Addr: a("0.0.0.0"), To: a("9.255.255.255")}, 0x10010, "low")
	add(policy.Key{Map: policy.NetID, Addr: a("10.0.0.0"), To: a("10.0.0.255")}, 0x10011, "")
	add(policy.Key{Map: policy.NetID, Addr: a("10.0.1.0"), To: a("10.0.1.7")}, 0x10012, "")
	add(policy.Key{Map: policy.NetID, Addr: a("255.0.0.0"), To: a("255.255.255.255")}, 0x10013, "high")
	add(policy.Key{Map: policy.NetID, Addr: a("fd00::"), To: a("fd00::ffff")}, 0x10014, "")
	add(policy.Key{Map: policy.NetID, Addr: a("ff00::"), To: a("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}, 0x10015, "")
	add(policy.Key{Map: policy.Access, X: 0x20000001, Y: 0x10000}, 0x40000001, "allow-web")
	add(policy.Key{Map: policy.AccessOthers, X: 0x20000001}, 0x40000002, "")
	add(policy.Key{Map: policy.AccessPort, X: 0x40000001, Protocol: policy.TCP, First: 80}, policy.CodeAllow, "")
	add(policy.Key{Map: policy.AccessPort, X: 0x40000001, Protocol: policy.ICMP, First: 8 << 8}, policy.CodeAllow, "")
	add(policy.Key{Map: policy.AccessRange, X: 0x40000001, Protocol: policy.UDP, First: 100, Last: 200}, policy.CodeAllowLog, "")
	add(policy.Key{Map: policy.AccessRange, X: 0x40000001, Protocol: policy.ICMPv6, First: 128 << 8, Last: 128<<8 | 255}, policy.CodeDenyLog, "")
	add(policy.Key{Map: policy.AccessRest, X: 0x40000001}, policy.CodeDeny, "")
	add(policy.Key{Map: policy.AccessRest, X: 0x40000002}, policy.CodeDeny, "")
	return ops
}

func TestKernelRoundTrip(t *testing.T) {
	needNft(t)
	namespace(t)
	ctx := context.Background()
	table := open(t, nft.Options{})
	ops := testElements()
	bind := []nft.Binding{
		{Interface: "nft0123456789ab", Addr: netip.MustParseAddr("10.1.0.1"), Masquerade: true, Comment: "shop/web"},
		{Interface: "nft0123456789ab", Addr: netip.MustParseAddr("fd00::1"), Comment: "shop/web"},
	}
	networks := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("10.1.2.0/24"), netip.MustParsePrefix("fd00::/48")}
	r, err := table.Apply(ctx, nft.Change{Delta: policy.Delta{Steps: [][]policy.Op{ops}}, Bind: bind, PodNetworks: networks})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	s, err := table.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range ops {
		if v, ok := s.Tables[o.Key]; !ok || v != o.Value {
			t.Errorf("read back %+v = %#x, %v; want %#x", o.Key, v, ok, o.Value)
		}
		k := o.Key
		if v, ok, err := table.Lookup(ctx, k); err != nil || !ok || v != o.Value {
			t.Errorf("lookup %+v = %#x, %v, %v; want %#x", k, v, ok, err, o.Value)
		}
	}
	if len(s.Tables) != len(ops) {
		t.Errorf("read back %d elements, want %d", len(s.Tables), len(ops))
	}
	if v, ok, err := table.Lookup(ctx, policy.Key{Map: policy.NetID, Addr: netip.MustParseAddr("10.0.1.5")}); v != 0x10012 || !ok || err != nil {
		t.Errorf("lookup inside a range: %#x %v %v", v, ok, err)
	}
	if v, ok, err := table.Lookup(ctx, policy.Key{Map: policy.AccessRange, X: 0x40000001, Protocol: policy.UDP, First: 150, Last: 150}); v != policy.CodeAllowLog || !ok || err != nil {
		t.Errorf("lookup inside a port range: %#x %v %v", v, ok, err)
	}
	if len(s.Bindings) != 2 || s.Bindings[0] != bind[0] || s.Bindings[1] != bind[1] {
		t.Errorf("bindings %+v", s.Bindings)
	}
	if len(s.PodNetworks) != 2 {
		t.Errorf("pod networks %v", s.PodNetworks)
	}
	listing := nftList(t)
	_ = table.Close()
	again := open(t, nft.Options{})
	s2, err := again.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if s2.Generation != s.Generation || s2.Epoch != s.Epoch {
		t.Errorf("adopting wrote: generation %d to %d, epoch %#x to %#x", s.Generation, s2.Generation, s.Epoch, s2.Epoch)
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	nftFile(t, listing)
	if reloaded := nftList(t); reloaded != listing {
		t.Errorf("the listing reloads as something else\n%s\n---\n%s", listing, reloaded)
	}
	reopened := open(t, nft.Options{})
	s3, err := reopened.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range ops {
		if v, ok := s3.Tables[o.Key]; !ok || v != o.Value {
			t.Errorf("after a reload by nft %+v = %#x, %v; want %#x", o.Key, v, ok, o.Value)
		}
	}
	if s3.Epoch != s.Epoch {
		t.Errorf("epoch %#x after the reload, want %#x", s3.Epoch, s.Epoch)
	}
}

// TestDocsShowTheProgram keeps docs/dataplane.md honest: every chain it shows is the program's, and only chains that
// repeat another family or direction are left out.
func TestDocsShowTheProgram(t *testing.T) {
	docs, err := os.ReadFile("../docs/dataplane.md")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("docs are not beside the test here")
	}
	if err != nil {
		t.Fatal(err)
	}
	chains := regexp.MustCompile(`(?s)\tchain (\w+) \{\n.*?\n\t\}\n`).FindAllStringSubmatch(nft.Program(), -1)
	for _, c := range chains {
		if strings.HasSuffix(c[1], "6") || strings.HasPrefix(c[1], "ingress") {
			continue
		}
		text := strings.ReplaceAll(strings.TrimPrefix(c[0], "\t"), "\n\t", "\n")
		if !strings.Contains(string(docs), text) {
			t.Errorf("docs/dataplane.md does not show chain %s as it is:\n%s", c[1], text)
		}
	}
}
