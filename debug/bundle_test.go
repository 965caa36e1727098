package debug

import (
	"strings"
	"testing"
)

// Every kind of secret goes, whatever its case, and nothing else does.
func TestWithoutSecrets(t *testing.T) {
	key := strings.Repeat("Ab1/", 10) + "xyz="
	for _, test := range []struct{ name, in, want string }{
		{"password", `{"Password": "hunter2"}`, `{"Password": "REMOVED"}`},
		{"passwd", `passwd=hunter2`, `passwd=REMOVED`},
		{"secret in compact JSON", `{"client-SECRET":"hunter2","app":"web"}`, `{"client-SECRET":"REMOVED","app":"web"}`},
		{"token", `x/token: hunter2`, `x/token: REMOVED`},
		{"API key", `apikey=a api-key=b`, `apikey=REMOVED api-key=REMOVED`},
		{"private key", `privateKey: a PRIVATE-KEY: b`, `privateKey: REMOVED PRIVATE-KEY: REMOVED`},
		{"bearer", `Authorization: Bearer abcdefgh1234`, `Authorization: Bearer REMOVED`},
		{"PEM", "a -----BEGIN RSA KEY-----\nabc\n-----END RSA KEY----- b", "a REMOVED b"},
		{"PEM in JSON", `{"x": "-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\n"}`, `{"x": "REMOVED\n"}`},
		{"kubeconfig", "client-key-data: LS0t\n    client-certificate-data: LS0t\n    token: abc", "client-key-data: REMOVED\n    client-certificate-data: REMOVED\n    token: REMOVED"},
		{"JSON web token", `{"label": "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"}`, `{"label": "REMOVED"}`},
		{"WireGuard", `"` + key + `"`, `"REMOVED"`},
		{"WireGuard at the start of a line", "a\n" + key, "a\nREMOVED"},
		{"no secret", `{"app": "web", "role": "db"}`, `{"app": "web", "role": "db"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := string(withoutSecrets([]byte(test.in))); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}
