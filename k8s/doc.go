// Package k8s answers WHO is there: it turns the objects of a Kubernetes API server
// (NewCluster) or of a directory of manifests (NewManifests) into the policy model.
// Both are a Source; nothing behind a Source knows which it was.
//
// What the API server's validation would refuse never reaches the model: it becomes a
// Problem that names file, object, field and remedy. Wherever meaning is lost, less is
// allowed, never more: a policy that turns invalid keeps its last accepted version in
// force, and one that was never valid isolates the pods it selects.
package k8s
