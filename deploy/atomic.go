package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// writeFile puts content at path in one step: a reader sees the old file or the new
// one. It reports whether anything changed.
func writeFile(path string, content []byte, mode fs.FileMode) (changed bool, err error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, content) {
		return false, nil
	}
	return true, replaceFile(path, bytes.NewReader(content), mode)
}

// replaceFile is writeFile for content that is not in memory. A program that is running
// from path goes on with the old file.
func replaceFile(path string, content io.Reader, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	// The name starts with a dot and ends in .tmp: neither libcni, which looks at the
	// extension, nor systemd takes it for a configuration.
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}

// replaceLink makes path a symbolic link to target in one step.
func replaceLink(path, target string) (changed bool, err error) {
	if old, err := os.Readlink(path); err == nil && old == target {
		return false, nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return false, fmt.Errorf("make directory: %w", err)
	}
	// The kernel has no create-or-replace for links; a name of our own and a rename do it.
	tmp := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d.tmp", filepath.Base(path), os.Getpid()))
	if err := os.Symlink(target, tmp); err != nil {
		return false, fmt.Errorf("link %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return false, errors.Join(fmt.Errorf("link %s: %w", path, err), os.Remove(tmp))
	}
	return true, nil
}

// sweep removes the temporary files of an install that was killed. The binary's alone has tens of
// megabytes, and nothing else would ever take them away.
func (l Layout) sweep(more ...string) error {
	for _, path := range append(append(l.files(), l.Config(), l.Conflist(), l.record(), l.proxied()), more...) {
		left, err := filepath.Glob(filepath.Join(l.in(filepath.Dir(path)), "."+filepath.Base(path)+".*.tmp"))
		if err != nil {
			return fmt.Errorf("look for temporary files: %w", err)
		}
		for _, name := range left {
			if _, err := remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// remove deletes path, a file or a link, and reports whether it was there.
func remove(path string) (bool, error) {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("remove: %w", err)
	}
	return true, nil
}
