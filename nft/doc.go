// Package nft is HOW the kernel is told: the one writer of netfilter objects. It owns the table inet nftcni,
// whose chains and rules are constant; policy, bindings and epochs are elements of its sets and maps.
package nft
