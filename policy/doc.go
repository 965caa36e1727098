// Package policy answers WHAT may talk to whom. It is pure: no I/O, no clock, no
// goroutine, no Kubernetes client. It holds the model (model.go), the oracle that
// evaluates one flow slowly and obviously (oracle.go), the compiler that turns a
// Cluster into the tables of one node, and the incremental Engine whose state
// always equals compiling from scratch.
package policy
