package deploy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// InstalledLayout is the layout that Install recorded in l's ConfigDir, below l's Root;
// without a record it is l.
func InstalledLayout(l Layout) (Layout, error) {
	b, err := os.ReadFile(l.in(l.record()))
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return l, fmt.Errorf("read the record of install: %w", err)
	}
	found := l
	if err := json.Unmarshal(b, &found); err != nil {
		return l, fmt.Errorf("record of install %s: %w", l.record(), err)
	}
	return found, found.Validate()
}

// Uninstall removes every file that Install, the plugin or the agent made, and puts the
// network configurations of others back. Our own configuration goes first: a
// runtime must not start a plugin that is being removed.
func Uninstall(l Layout) ([]Step, error) {
	if err := l.Validate(); err != nil {
		return nil, err
	}
	if err := l.sweep(filepath.Join(l.ConfDir, "??-"+conflistName)); err != nil {
		return nil, err
	}
	var steps []Step
	for _, path := range ownConflists(l.in(l.ConfDir)) {
		if _, err := remove(path); err != nil {
			return steps, err
		}
		steps = append(steps, Step{"removed", filepath.Join(l.ConfDir, filepath.Base(path)), ""})
	}
	for _, path := range disabledConflists(l.in(l.ConfDir)) {
		restored, kept, err := enable(path)
		if err != nil {
			return steps, err
		}
		steps = append(steps, restoredStep(l, path, restored, kept))
	}
	for _, path := range l.files() {
		gone, err := remove(l.in(path))
		if err != nil {
			return steps, err
		}
		if gone {
			steps = append(steps, Step{"removed", path, ""})
		}
	}
	for _, dir := range l.ownDirs() {
		if _, err := os.Lstat(l.in(dir)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := removeTree(l.in(dir)); err != nil {
			return steps, err
		}
		steps = append(steps, Step{"removed", dir, "with what was in it"})
	}
	return steps, nil
}

func restoredStep(l Layout, path string, restored bool, kept string) Step {
	original := filepath.Join(l.ConfDir, filepath.Base(path[:len(path)-len(DisabledSuffix)]))
	if restored {
		return Step{"put back", original, ""}
	}
	if kept != "" {
		return Step{"kept", filepath.Join(l.ConfDir, filepath.Base(kept)), "its owner has written a new " + filepath.Base(original)}
	}
	return Step{"removed", original + DisabledSuffix, "its owner has written " + filepath.Base(original) + " again, the same"}
}

// removeTree empties a directory and removes it; a directory that is a mount point stays,
// empty.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove: %w", err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}

// files are the single files and links that can be ours, in the order of their removal.
func (l Layout) files() []string {
	out := []string{l.enabled(), l.unit()}
	for _, name := range sortedKeys(l.dropIns()) {
		out = append(out, l.dropIns()[name])
	}
	out = append(out, sortedKeys(l.links())...)
	return append(out, l.Binary())
}

func (l Layout) ownDirs() []string { return []string{l.RunDir, l.StateDir, l.ConfigDir} }

// Residue lists the files of ours that are still on the node: none after Uninstall.
// Configurations of others that are still moved aside count.
func Residue(l Layout) []string {
	var out []string
	for _, path := range append(ownConflists(l.in(l.ConfDir)), disabledConflists(l.in(l.ConfDir))...) {
		out = append(out, filepath.Join(l.ConfDir, filepath.Base(path)))
	}
	for _, path := range l.files() {
		if _, err := os.Lstat(l.in(path)); err == nil {
			out = append(out, path)
		}
	}
	for _, dir := range l.ownDirs() {
		entries, err := os.ReadDir(l.in(dir))
		if err == nil && (len(entries) > 0 || !isMountPoint(l.in(dir))) {
			out = append(out, dir)
		}
	}
	return out
}

// isMountPoint says whether something is mounted on dir: it cannot be removed then.
func isMountPoint(dir string) bool {
	var x unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, 0, &x)
	return err == nil && x.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 // Linux 5.8
}
