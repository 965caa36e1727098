// Package policy answers WHAT may talk to whom. It is pure: no I/O, no clock, no
// goroutine, no Kubernetes client. It holds the model (model.go), the oracle that
// evaluates one flow slowly and obviously (oracle.go), and the Engine that compiles a
// Cluster into the Tables of one node and follows its events. The oracle and the
// compiler share nothing but the model.
//
// # How the compiler works
//
// An atom is the set of peers of a rule. The signature of an address is the atoms that
// hold it and the numbers of its named ports that egress rules ask for; an identity is
// a number for a signature. A profile is a number for the policies that select a pod in
// one direction. For a profile and a signature the rules are walked once, which gives a
// class: a function from protocol and port to a code. Only atoms of rules that are in
// force on this node exist, so most pods of a large cluster have no signature at all.
//
// # How it changes
//
// The order of a Delta's steps, and why no packet is decided as neither the old nor the
// new policy demands, is explained on plan (plan.go). Beyond the order, a dataplane
// must do four things:
//
//   - A key that Drops of an earlier delta still owes a deletion must not be changed
//     before; wait for the grace period and commit the Drops first. Delta.Settle asks
//     for the same for all Drops owed.
//   - Delta.Pause asks for a grace period between two steps.
//   - After a delta that changed the profiles or the isolation of an address that was
//     local before, a grace period passes before the next delta's first step that changes
//     an element of an address: a packet may have found it without a profile before the
//     one, isolated after it, and would find it without again (docs/decisions/0006).
//   - A profile that is not found for a member of the isolated set is looked up once
//     more before the miss denies.
//
// Identities merge, and elements that no rule needs any more go, only in Tidy.
//
// # Limits
//
// A packet that reads its egress decision before one delta and its ingress decision
// after the next one can mix the two deltas; each direction by itself is exact, however
// long a packet is in flight. AnyProtocol with a port range covers TCP, UDP and SCTP.
package policy
