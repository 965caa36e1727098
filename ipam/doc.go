// Package ipam answers WHICH address: it keeps the leases of a node in one file that
// several processes share.
//
// An address is leased once per file, whatever the network: on a routed node two pods
// with one address cannot both be reached, so networks whose ranges overlap share them.
// Next is the lowest address never used before, then the one released longest ago.
//
// The file is a bbolt database that is never synced to disk. A killed process leaves it
// whole, because the page cache keeps the order of its writes; a power cut may not, but
// it also ends every pod that held a lease. So the first opening after a boot reads the
// whole file, and one that does not make sense is set aside and rebuilt from what lives
// (docs/decisions/0020-leases-without-fsync.md).
package ipam
