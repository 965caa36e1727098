package agent

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/nftcni/nftcni/cni"
)

// FuzzRequest sends a body to every path of the socket that takes one: what does not decode
// is refused with code 6, and what is admitted holds nothing that could reach nftables or a
// file name unchecked.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"network":"n","containerID":"a","interface":"eth0","hostInterface":"nft0123456789ab","addresses":["10.0.0.2","fd00::2"]}`))
	f.Add([]byte(`{"containerID":"a","interface":"eth0","hostInterface":"../../etc","addresses":["10.0.0.2"]}`))
	f.Add([]byte(`{"containerID":"a","interface":"eth0","hostInterface":"nft0123456789ab","addresses":["::ffff:10.0.0.2","fe80::1%eth0"]}`))
	f.Add([]byte(`{"addresses":["0.0.0.0/0"]}`))
	f.Add([]byte(`{"labels":{"a":1}}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, into := range []any{new(cni.AttachRequest), new(cni.DetachRequest)} {
			w := httptest.NewRecorder()
			ok := decode(w, httptest.NewRequest(http.MethodPost, cni.PathAttach, bytes.NewReader(body)), into)
			var said cni.Error
			if !ok && (w.Code != http.StatusBadRequest || json.Unmarshal(w.Body.Bytes(), &said) != nil || said.Code != codeDecode || said.Message == "") {
				t.Errorf("refused with %d %q", w.Code, w.Body)
			}
			req, attach := into.(*cni.AttachRequest)
			if !ok || !attach || checkAttachment(req.Attachment) != nil {
				continue
			}
			if len(req.HostInterface) != 15 || req.ContainerID == "" || len(req.Addresses) == 0 {
				t.Errorf("admitted %+v", req.Attachment)
			}
			for i, a := range req.Addresses {
				if a.Zone() != "" || a.Is4In6() || a.IsLoopback() || a.IsMulticast() || slices.Contains(req.Addresses[:i], a) {
					t.Errorf("admitted address %s of %v", a, req.Addresses)
				}
			}
		}
	})
}
