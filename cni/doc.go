// Package cni answers WIRES: it is the CNI plugin, the one writer of links,
// addresses, routes and neighbours, and the owner of the request and response types
// that plugin and agent exchange over a local unix socket (api.go, client.go).
package cni
