package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// DisabledSuffix is appended to the network configurations of others while nftcni is
// installed. libcni reads .conf, .conflist and .json only.
const DisabledSuffix = ".nftcni-disabled"

const (
	conflistName = "nftcni.conflist"
	// DefaultPrefix sorts our configuration before those of others: the runtime takes the first.
	DefaultPrefix = "00-"
)

var prefixForm = regexp.MustCompile(`^[0-9]{2}-$`)

// DefaultConflist is the network configuration for a node whose addresses come from
// Node.spec.podCIDRs.
func DefaultConflist() []byte { return embedded(conflistName) }

// WriteConflist puts content into confDir as <prefix>nftcni.conflist, in one step, and
// removes the one that an earlier prefix left. Files of others are not touched. It is
// called when the agent can serve: a runtime calls the node ready from that moment.
// An error names the field of content that is wrong.
func WriteConflist(confDir, prefix string, content []byte) (path string, changed bool, err error) {
	if !prefixForm.MatchString(prefix) {
		return "", false, fmt.Errorf("prefix of the network configuration is %q: it takes two digits and a dash, such as 00- or 10-", prefix)
	}
	if err := checkConflist(content); err != nil {
		return "", false, err
	}
	path = filepath.Join(confDir, prefix+conflistName)
	changed, err = writeFile(path, content, 0o644)
	if err != nil {
		return "", false, err
	}
	for _, old := range ownConflists(confDir) {
		if old == path {
			continue
		}
		if _, err := remove(old); err != nil {
			return "", false, err
		}
		changed = true
	}
	return path, changed, nil
}

func checkConflist(content []byte) error {
	var list conflist
	if err := json.Unmarshal(content, &list); err != nil {
		return fmt.Errorf("network configuration is not JSON of a CNI list: %w", err)
	}
	switch {
	case list.Name == "":
		return errors.New("network configuration: field name is empty: give the network a name, such as nftcni")
	case list.CNIVersion == "":
		return errors.New("network configuration: field cniVersion is empty: it takes 0.3.1 to 1.1.0")
	case !slices.Contains(list.types(), "nftcni"):
		return fmt.Errorf("network configuration %s: no entry of field plugins has type nftcni", list.Name)
	}
	return nil
}

// conflist is what this package reads of a network configuration, list or single.
type conflist struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Type       string `json:"type"`
	Plugins    []struct {
		Type string `json:"type"`
	} `json:"plugins"`
}

func (c conflist) types() []string {
	var out []string
	if c.Type != "" {
		out = append(out, c.Type)
	}
	for _, p := range c.Plugins {
		out = append(out, p.Type)
	}
	return out
}

// ownConflists are the files in confDir with our name, whatever the prefix.
func ownConflists(confDir string) []string {
	return configurations(confDir, func(name string) bool { return isOwn(name) })
}

func isOwn(name string) bool {
	return strings.HasSuffix(name, conflistName) && prefixForm.MatchString(strings.TrimSuffix(name, conflistName))
}

// othersConflists are the files in confDir that a runtime would read and that are not ours.
func othersConflists(confDir string) []string {
	return configurations(confDir, func(name string) bool {
		return !isOwn(name) && slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
	})
}

func disabledConflists(confDir string) []string {
	return configurations(confDir, func(name string) bool { return strings.HasSuffix(name, DisabledSuffix) })
}

// configurations lists confDir's regular files and links by name; a directory that
// cannot be read holds none.
func configurations(confDir string, want func(string) bool) []string {
	entries, err := os.ReadDir(confDir)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if !e.IsDir() && want(e.Name()) {
			out = append(out, filepath.Join(confDir, e.Name()))
		}
	}
	return out
}

// describe names the network and the plugins of a configuration, for people.
func describe(path string) string {
	b, err := os.ReadFile(path)
	var list conflist
	if err != nil || json.Unmarshal(b, &list) != nil {
		return "unreadable"
	}
	return fmt.Sprintf("network %q, plugins %s", list.Name, strings.Join(list.types(), ", "))
}

// SupersededSuffix is appended to a configuration of others that was moved aside and that
// its owner has written anew since, differently: nothing of others is deleted.
const SupersededSuffix = ".nftcni-superseded"

// disable moves a configuration aside.
func disable(path string) error {
	if _, err := supersede(path+DisabledSuffix, path); err != nil {
		return err
	}
	if err := os.Rename(path, path+DisabledSuffix); err != nil {
		return fmt.Errorf("move aside: %w", err)
	}
	return nil
}

// enable puts a configuration back, unless its owner wrote a new one meanwhile: then it is
// kept under another name, or removed if it is the same.
func enable(path string) (restored bool, kept string, err error) {
	original := strings.TrimSuffix(path, DisabledSuffix)
	if _, err := os.Lstat(original); !errors.Is(err, fs.ErrNotExist) {
		kept, err := supersede(path, original)
		return false, kept, err
	}
	if err := os.Rename(path, original); err != nil {
		return false, "", fmt.Errorf("put back: %w", err)
	}
	return true, "", nil
}

// supersede makes room at older, if it is there: it is removed where newer holds the same,
// and gets the first free name with SupersededSuffix otherwise.
func supersede(older, newer string) (kept string, err error) {
	if _, err := os.Lstat(older); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	old, err := os.ReadFile(older)
	if now, newErr := os.ReadFile(newer); err == nil && newErr == nil && bytes.Equal(old, now) {
		_, err := remove(older)
		return "", err
	}
	base := strings.TrimSuffix(older, DisabledSuffix) + SupersededSuffix
	kept = base
	for n := 1; ; n++ {
		if _, err := os.Lstat(kept); errors.Is(err, fs.ErrNotExist) {
			break
		}
		kept = fmt.Sprintf("%s.%d", base, n)
	}
	if err := os.Rename(older, kept); err != nil {
		return "", fmt.Errorf("keep what was moved aside: %w", err)
	}
	return kept, nil
}
