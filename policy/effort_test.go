package policy_test

import "os"

// effort returns how much a random test does. NFTCNI_EFFORT=fast is the suite that
// scripts/mutate runs once a mutant, NFTCNI_EFFORT=full is for a night; CI=true judges
// the million flows that are promised.
func effort(fast, normal, ci, full uint64) uint64 {
	switch {
	case os.Getenv("NFTCNI_EFFORT") == "fast":
		return fast
	case os.Getenv("NFTCNI_EFFORT") == "full":
		return full
	case os.Getenv("CI") == "true":
		return ci
	}
	return normal
}
