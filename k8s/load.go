package k8s

import (
	"fmt"

	"github.com/nftcni/nftcni/policy"
)

// LoadDir reads a directory of manifests, or one manifest, once. The result is what
// Manifests would put in force at its start. The error is about dir itself; files that
// cannot be read are problems.
func LoadDir(dir string) (*policy.Cluster, []Problem, error) {
	paths, unread, err := listManifests(dir, func(string) error { return nil })
	if err != nil {
		return nil, nil, fmt.Errorf("load manifests: %w", err)
	}
	var problems []Problem
	if unread != nil {
		problems = append(problems, Problem{Severity: Refused, File: dir, Message: unread.Error(),
			Effect: "what is below it is not in force", Remedy: "make all directories readable"})
	}
	files := map[string]*parsedFile{}
	for path := range paths {
		data, err := readAnyway(path)
		if err != nil {
			problems = append(problems, Problem{Severity: Refused, File: path, Message: err.Error(),
				Effect: "objects that it defines are not in force", Remedy: "make it a readable regular file"})
			continue
		}
		parsed := parseFile(path, data)
		files[path] = &parsed
	}
	inv := newInventory()
	inv.update(files)
	return inv.cluster(), sortProblems(append(problems, inv.problems(nil)...)), nil
}

// ParseManifests reads the documents of one file and returns what it puts in force:
// every object that is valid, the isolating substitutes of policies that are not, and
// the namespaces that are implied. name is the file's name for problems; a name that
// ends in .json may be a sequence of JSON objects.
func ParseManifests(name string, data []byte) ([]policy.Event, []Problem) {
	parsed := parseFile(name, data)
	inv := newInventory()
	events := inv.update(map[string]*parsedFile{name: &parsed})
	return events, inv.problems(nil)
}
