package agent

import (
	"os"
	"strings"
	"testing"
)

// TestRunDirOfOthers: a run directory that others may write to is refused.
func TestRunDirOfOthers(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		mode os.FileMode
		want string
	}{{0o700, ""}, {0o755, ""}, {0o777, "mode 0777"}, {0o775, "mode 0775"}} {
		if err := os.Chmod(dir, tt.mode); err != nil {
			t.Fatal(err)
		}
		f, err := lock(dir)
		if err == nil {
			err = f.Close()
			if tt.want != "" {
				t.Errorf("mode %o is accepted", tt.mode)
			}
		} else if tt.want == "" || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("mode %o: %v", tt.mode, err)
		}
		if err != nil && tt.want == "" {
			t.Error(err)
		}
	}
}
