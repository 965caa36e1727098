package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// loadPrivateKey reads this node's key, or makes it on first use. It never leaves the node.
func loadPrivateKey(dir string) (wgKey, error) {
	name := keyPath(dir)
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return newPrivateKey(dir)
	}
	if err != nil {
		return wgKey{}, fmt.Errorf("wireguard private key: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return wgKey{}, fmt.Errorf("wireguard private key %s has mode %v: remove it if others may have read it (a new one is made), else chmod 600", name, info.Mode())
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return wgKey{}, fmt.Errorf("wireguard private key: %w", err)
	}
	key, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		return wgKey{}, fmt.Errorf("wireguard private key %s is damaged: remove it, and a new one is made: %w", name, err)
	}
	return key, nil
}

// newPrivateKey writes a key of its own so that a crash leaves the old file or the new one.
func newPrivateKey(dir string) (wgKey, error) {
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return wgKey{}, fmt.Errorf("make wireguard private key: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return wgKey{}, fmt.Errorf("wireguard private key: %w", err)
	}
	f, err := os.CreateTemp(dir, privateKeyFile+".*") // mode 0600
	if err != nil {
		return wgKey{}, fmt.Errorf("wireguard private key: %w", err)
	}
	_, err = f.WriteString(key.String() + "\n")
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), keyPath(dir))
	}
	if err != nil {
		return wgKey{}, errors.Join(fmt.Errorf("wireguard private key: %w", err), os.Remove(f.Name()))
	}
	return key, nil
}

// RotateKey makes a new private key, puts it into the device and returns the public key to publish. Packets from
// peers are taken under the old session until they know the new key; what this node sends waits for
// them in the device's queue, so publish at once. It needs EncryptWireGuard.
func (m *Mesh) RotateKey(ctx context.Context) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wg == nil {
		return "", errors.New("rotate wireguard key: mesh encrypt is none")
	}
	key, err := newPrivateKey(m.cfg.StateDir)
	if err != nil {
		return "", err
	}
	m.wg.key = key
	if m.isSet {
		_, err = m.pass(ctx)
	}
	return key.PublicKey().String(), err
}
