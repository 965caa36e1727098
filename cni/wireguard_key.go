package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// A keyring is one key of a node, or two while the node rotates: an old and a new one, told apart
// by parity. All four pairs that two rotating nodes can have exist side by side on devices of their
// own, so each node moves each peer when it has seen that the new pair works, and no packet is
// lost.
type keyring struct {
	key    [2]wgKey // by parity; zero: none
	newest int
}

// parities lists those that have a key, the newest first.
func (k keyring) parities() []int {
	if k.key[1-k.newest] == (wgKey{}) {
		return []int{k.newest}
	}
	return []int{k.newest, 1 - k.newest}
}

func (k keyring) list() []wgKey {
	var keys []wgKey
	for _, i := range k.parities() {
		keys = append(keys, k.key[i])
	}
	return keys
}

func (k keyring) public() keyring {
	for _, i := range k.parities() {
		k.key[i] = k.key[i].PublicKey()
	}
	return k
}

// String is how keys are published and kept: parity and base64, the newest last.
func (k keyring) String() string {
	text := ""
	for _, i := range k.parities() {
		text = fmt.Sprintf(" %d:%s", i, k.key[i]) + text
	}
	return text[1:]
}

// parseKeyring reads String, and one key alone as wg(8) prints it (parity 0). It comes from other
// nodes.
func parseKeyring(text string) (keyring, error) {
	var k keyring
	fields := strings.Fields(text)
	if len(fields) == 0 || len(fields) > 2 {
		return k, fmt.Errorf("%d keys: it takes one or two", len(fields))
	}
	for _, field := range fields {
		k.newest = 0
		switch {
		case strings.HasPrefix(field, "0:"):
		case strings.HasPrefix(field, "1:"):
			k.newest = 1
		default:
			field = "0:" + field
		}
		key, err := wgtypes.ParseKey(field[2:])
		if err != nil || key == (wgKey{}) {
			return keyring{}, errors.New("not 32 bytes in base64, or all zero")
		}
		if k.key[k.newest] != (wgKey{}) {
			return keyring{}, fmt.Errorf("two keys of parity %d", k.newest)
		}
		k.key[k.newest] = key
	}
	return k, nil
}

// privateKeyFile is in the state directory.
const privateKeyFile = "wireguard.key"

// loadPrivateKeys reads this node's keys, or makes one on first use. They never leave the node.
func loadPrivateKeys(dir string) (keyring, error) {
	name := filepath.Join(dir, privateKeyFile)
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return addPrivateKey(dir, keyring{}, 0)
	}
	if err != nil {
		return keyring{}, fmt.Errorf("wireguard private key: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return keyring{}, fmt.Errorf("wireguard private key %s has mode %v: remove it if others may have read it (a new one is made), else chmod 600", name, info.Mode())
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return keyring{}, fmt.Errorf("wireguard private key: %w", err)
	}
	keys, err := parseKeyring(string(text))
	if err != nil {
		return keyring{}, fmt.Errorf("wireguard private key %s is damaged: remove it, and a new one is made: %w", name, err)
	}
	return keys, nil
}

func addPrivateKey(dir string, keys keyring, parity int) (keyring, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return keyring{}, fmt.Errorf("make wireguard private key: %w", err)
	}
	keys.key[parity], keys.newest = key, parity
	return keys, savePrivateKeys(dir, keys)
}

// savePrivateKeys leaves the old file or the new one, whatever happens meanwhile.
func savePrivateKeys(dir string, keys keyring) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("wireguard private key: %w", err)
	}
	f, err := os.CreateTemp(dir, privateKeyFile+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("wireguard private key: %w", err)
	}
	_, err = f.WriteString(keys.String() + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, privateKeyFile))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("wireguard private key: %w", err), os.Remove(f.Name()))
	}
	return nil
}

// RotateKey makes a second private key and returns what to publish in place of PublicKey's last
// answer. The old key stays in force: Run moves each peer to the new one when the peer has taken
// it, and Report.Rotating counts those that have not. When it is 0 on all nodes, RetireKey ends the
// rotation. It needs EncryptWireGuard.
func (m *Mesh) RotateKey(ctx context.Context) (string, error) {
	return m.changeKeys(ctx, "rotate", func(k keyring) (keyring, error) {
		if len(k.list()) == 2 {
			return k, errors.New("the last rotation has not ended: RetireKey first")
		}
		return addPrivateKey(m.cfg.StateDir, k, 1-k.newest)
	})
}

// RetireKey forgets the old key of a rotation and returns what to publish. Peers that have not
// moved by then are unreachable until they do. Without a rotation it changes nothing.
func (m *Mesh) RetireKey(ctx context.Context) (string, error) {
	return m.changeKeys(ctx, "retire", func(k keyring) (keyring, error) {
		if len(k.list()) == 1 {
			return k, nil
		}
		k.key[1-k.newest] = wgKey{}
		return k, savePrivateKeys(m.cfg.StateDir, k)
	})
}

func (m *Mesh) changeKeys(ctx context.Context, what string, change func(keyring) (keyring, error)) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wg == nil {
		return "", fmt.Errorf("%s wireguard key: mesh encrypt is none", what)
	}
	keys, err := change(m.wg.keys)
	if err != nil {
		return "", fmt.Errorf("%s wireguard key: %w", what, err)
	}
	m.wg.keys = keys
	if m.isSet {
		_, err = m.pass(ctx)
	}
	return keys.public().String(), err
}
