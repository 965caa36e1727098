package agent

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nftcni/nftcni/nft"
)

func TestPodToHostConfig(t *testing.T) {
	for _, tt := range []struct {
		name  string
		cfg   Config
		ports []string // open, besides DNS
		deny  bool
		want  string
	}{
		{name: "default"},
		{name: "deny", cfg: Config{PodToHost: "deny"}, deny: true},
		{name: "ports", cfg: Config{PodToHost: "deny", PodToHostPorts: []string{"tcp/10250", "sctp/1"}}, deny: true, ports: []string{"tcp/10250", "sctp/1"}},
		{name: "value", cfg: Config{PodToHost: "drop"}, want: `podToHost is "drop": it takes allow or deny`},
		{name: "no protocol", cfg: Config{PodToHostPorts: []string{"80"}}, want: `podToHostPorts[0] is "80"`},
		{name: "upper case", cfg: Config{PodToHostPorts: []string{"tcp/1", "TCP/80"}}, want: `podToHostPorts[1] is "TCP/80"`},
		{name: "port 0", cfg: Config{PodToHostPorts: []string{"tcp/0"}}, want: "as tcp/10250"},
		{name: "range", cfg: Config{PodToHostPorts: []string{"tcp/65536"}}, want: "as tcp/10250"},
		{name: "beside another CNI", cfg: Config{PodToHost: "deny", Network: NetworkNone}, want: "deny with network none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.Node = "n1"
			c, err := tt.cfg.withDefaults()
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want one with %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			to, err := c.podToHost()
			var open []string
			for _, p := range to.Open {
				open = append(open, p.String())
			}
			if want := append([]string{"tcp/53", "udp/53"}, tt.ports...); err != nil || to.Deny != tt.deny || !slices.Equal(open, want) {
				t.Errorf("deny %v, open %v, %v; want %v, %v", to.Deny, open, err, tt.deny, want)
			}
		})
	}
}

// TestPodToHostFollowsTheConfiguration: a restart with another setting puts it in force, one with the same writes nothing.
func TestPodToHostFollowsTheConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := newMemoryTable()
		for _, step := range []struct {
			setting string
			writes  int
		}{{PodToHostAllow, 0}, {PodToHostDeny, 1}, {PodToHostDeny, 0}, {PodToHostAllow, 1}, {PodToHostAllow, 0}} {
			before := table.writes
			l, ctx := startLoop(t, table, func(l *loop) { l.cfg.PodToHost = step.setting })
			_ = l.send(ctx, l.replace(shopCluster, nil))
			synctest.Wait()
			if table.toHost.Deny != (step.setting == PodToHostDeny) {
				t.Errorf("%s: the table has %+v", step.setting, table.toHost)
			}
			if before > 0 && table.writes-before != step.writes {
				t.Errorf("%s: %d writes, want %d", step.setting, table.writes-before, step.writes)
			}
		}
		if !table.toHost.Equal(nft.PodToHost{}) {
			t.Errorf("at the end %+v", table.toHost)
		}
	})
}
