// Package agent is the loop that keeps the kernel equal to what is wanted: a source of
// objects (package k8s) and the attachments of this node (package cni) go through one
// policy.Engine into one nft.Table. One goroutine owns engine and table; everything
// else (socket requests, watch events, grace periods) reaches it through a channel.
package agent
