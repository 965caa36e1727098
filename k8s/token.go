package k8s

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// tokenClaims are the claims of a service account token that renewing needs
// (k8s.io/kubernetes/pkg/serviceaccount, private claims). Times are Unix seconds.
type tokenClaims struct {
	Issued     int64 `json:"iat"`
	Expires    int64 `json:"exp"`
	Kubernetes struct {
		Namespace      string `json:"namespace"`
		ServiceAccount struct {
			Name string `json:"name"`
		} `json:"serviceaccount"`
		Pod  *struct{} `json:"pod"`
		Node *struct {
			Name string `json:"name"`
			UID  string `json:"uid"`
		} `json:"node"`
	} `json:"kubernetes.io"`
}

// life is how long a token is used: the kubelet too renews one after 80% of its life.
func (t tokenClaims) life() time.Duration {
	return time.Duration(t.Expires-t.Issued) * time.Second * 4 / 5
}

// maxTokenFile bounds what is read of a token file, in bytes.
const maxTokenFile = 64 << 10

// readClaims decodes the token in path; it does not verify it, the API server does.
func readClaims(path string) (tokenClaims, error) {
	var claims tokenClaims
	f, err := os.Open(path)
	if err != nil {
		return claims, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile))
	if err != nil {
		return claims, err
	}
	parts := strings.Split(strings.TrimSpace(string(b)), ".")
	if len(parts) != 3 {
		return claims, fmt.Errorf("%s holds no JSON web token", path)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return claims, fmt.Errorf("decode token %s: %w", path, err)
	}
	return claims, nil
}

// keepToken renews the token file of the kubeconfig until ctx is done, if it holds a
// service account token that is bound to a Node. Other credentials are left to who made them; client-go
// reads the file again by itself.
func (c *Cluster) keepToken(ctx context.Context) {
	said := ""
	var issued int64
	seen := time.Now()
	age := func(of int64) time.Duration {
		if of != issued {
			issued, seen = of, time.Now()
		}
		return time.Since(seen)
	}
	for {
		wait, err := c.renewToken(ctx, time.Now(), age)
		if err != nil {
			wait = time.Minute
			if err.Error() != said && ctx.Err() == nil {
				c.log.Error("token of the kubeconfig is not renewed: trying again every minute", "err", err)
			}
			said = err.Error()
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// renewToken replaces the token if it is due, by the clock (now) or because it is known long
// enough: age tells for how long, of the token issued at that Unix time, and does not follow
// a clock that is set back. It returns when to look again: at most an hour later, because
// the file may be replaced by hand.
func (c *Cluster) renewToken(ctx context.Context, now time.Time, age func(issued int64) time.Duration) (time.Duration, error) {
	path := c.clients.tokenFile
	claims, err := readClaims(path)
	if err != nil {
		return 0, err
	}
	k := claims.Kubernetes
	if k.Node == nil || k.Pod != nil || claims.Expires == 0 {
		return time.Hour, nil
	}
	wait := min(time.Unix(claims.Issued, 0).Add(claims.life()).Sub(now), claims.life()-age(claims.Issued))
	if wait > 0 {
		return min(wait, time.Hour), nil
	}
	token, err := c.requestToken(ctx, claims)
	if err != nil {
		return 0, fmt.Errorf("request a token for service account %s/%s, bound to node %s: %w", k.Namespace, k.ServiceAccount.Name, k.Node.Name, err)
	}
	if err := replaceToken(path, token); err != nil {
		return 0, err
	}
	c.log.Info("token renewed", "file", path, "node", k.Node.Name)
	return time.Minute, nil
}

// requestToken asks for one like claims (authentication.k8s.io/v1, TokenRequest).
func (c *Cluster) requestToken(ctx context.Context, claims tokenClaims) (string, error) {
	k := claims.Kubernetes
	body, err := json.Marshal(map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{
			"expirationSeconds": claims.Expires - claims.Issued,
			"boundObjectRef":    map[string]any{"apiVersion": "v1", "kind": "Node", "name": k.Node.Name, "uid": k.Node.UID},
		},
	})
	if err != nil {
		return "", err
	}
	answer, err := c.clients.core.Post().Namespace(k.Namespace).Resource("serviceaccounts").Name(k.ServiceAccount.Name).SubResource("token").
		SetHeader("Content-Type", "application/json").SetHeader("Accept", "application/json").Body(body).DoRaw(ctx)
	if err != nil {
		return "", err
	}
	var got struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	if err := json.Unmarshal(answer, &got); err != nil {
		return "", fmt.Errorf("decode the answer: %w", err)
	}
	if got.Status.Token == "" {
		return "", errors.New("the answer holds no token")
	}
	return got.Status.Token, nil
}

// replaceToken puts token into path in one step, readable by its owner only.
func replaceToken(path, token string) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write token: %w", err)
	}
	_, err = f.WriteString(token + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write token %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}
