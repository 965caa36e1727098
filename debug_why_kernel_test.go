package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/nftcni/nftcni/debug"
)

// checkWhy asks `debug why` each question whose answer the packets gave: its verdict must
// be theirs, and its oracle must agree with the kernel's elements.
func checkWhy(t *testing.T, n *demoNode, questions []question) {
	t.Helper()
	for _, q := range questions {
		root := newRootCommand()
		var out, stderr bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&stderr)
		root.SetArgs([]string{"debug", "why", q.Src.String(), q.Dst.String(), strings.ToUpper(q.service.String()), "-o", "json", "--state-dir", n.path("state")})
		if err := root.ExecuteContext(t.Context()); err != nil {
			t.Errorf("%s\ndebug why: %v\n%s%s", q.line, err, out.Bytes(), stderr.Bytes())
			continue
		}
		var answers []debug.Answer
		if err := json.Unmarshal(out.Bytes(), &answers); err != nil || len(answers) != 1 {
			t.Errorf("%s\ndebug why: %v in %s", q.line, err, out.Bytes())
			continue
		}
		if a := answers[0]; a.AllowedHere != q.allow || !a.Agree || a.Egress.Kernel == nil {
			t.Errorf("%s\ndebug why says otherwise than the packets: %s", q.line, out.Bytes())
		}
	}
}
