// Package debug answers what an engineer on the host asks: what is in force, for whom,
// and why. It asks the running agent over its socket and the kernel over netlink; the
// verdicts come from the policy oracle.
package debug
