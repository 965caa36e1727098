# Sourced by scripts/cluster-test: pods that talk while something happens to their nodes.
# Nothing that is allowed may be lost, nothing that is denied may pass.

# traffic_pods NAMESPACE: a server, a friend on another node that policy lets in, a stranger
# on each node
traffic_pods() {
  k -n "$1" apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80, --udp-port=80]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {nodeName: $(last_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: near}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: far}
spec: {nodeName: $(last_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
K
  local pod
  k -n "$1" wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  server=$(pod_address "$1" server)
  for pod in near far; do
    check "$1: $pod denied before" gone_within 5 k -n "$1" exec $pod -- nc -z -w 1 "$server" 80
  done
  check "$1: friend allowed before" within 5 k -n "$1" exec friend -- nc -z -w 1 "$server" 80
}

# What a client runs, until /tmp/stop appears or 240 s are over: one UDP flow, each packet sent
# when the last one was answered, and one new TCP connection after another. Loops of shell built-ins:
# nobody in a pod reaps what they leave. A read takes one byte of a datagram, and drops the rest.
# shellcheck disable=SC2016
traffic_client='
mkfifo /tmp/never; exec 4<>/tmp/never
going() { [ ! -e /tmp/stop ] && [ $SECONDS -lt 240 ]; }
udp() {
  local sent=0 got=0 c
  exec 3<>/dev/udp/$1/80
  while going; do
    sent=$((sent + 1))
    { echo hostname >&3; } 2>/dev/null
    if read -r -t "$2" -n 1 -u 3 c; then got=$((got + 1)); fi
    read -r -t 0.004 -u 4 || true
  done
  echo "$got $sent" >/tmp/udp.new; mv /tmp/udp.new /tmp/udp
}
tcp() {
  local sent=0 got=0 said began
  while going; do
    sent=$((sent + 1)) began=$EPOCHREALTIME
    if said=$(nc -v -z -w "$2" "$1" 80 2>&1); then got=$((got + 1)); else echo "$began to $EPOCHREALTIME: $said" >>/tmp/failed; fi
  done
  echo "$got $sent" >/tmp/tcp.new; mv /tmp/tcp.new /tmp/tcp
}
udp "$1" "$2" & tcp "$1" "$3" & wait'

# under_traffic NAMESPACE TIMES COMMAND...: clients talk to the server while the command runs that often.
# They do not depend on the exec that started them: a runtime's restart ends that.
under_traffic() {
  local ns=$1 times=$2 pod kind i got sent
  shift 2
  client "$ns" friend 3 3
  client "$ns" near 0.05 1
  client "$ns" far 0.05 1
  for ((i = 1; i <= times; i++)); do
    sleep 2
    "$@" || echo "     the command ended with $?: $*"
  done
  sleep 2
  for pod in friend near far; do within 60 k -n "$ns" exec $pod -- touch /tmp/stop; done
  for pod in friend near far; do
    for kind in udp tcp; do
      read -r got sent < <(within 60 k -n "$ns" exec $pod -- cat /tmp/$kind) || got=none sent=0
      if [ $pod = friend ]; then
        check "$ns: $kind of friend: $got of $sent answered" test "$got" = "$sent" -a "$sent" -gt 20
        [ "$got" = "$sent" ] || k -n "$ns" exec $pod -- cat /tmp/failed | sed 's/^/     /' || true
      else
        check "$ns: $kind of $pod, which is denied: $got of $sent answered" test "$got" = 0 -a "$sent" -gt 5
      fi
    done
  done
}

# client NAMESPACE POD SECONDS-FOR-UDP SECONDS-FOR-TCP
client() { k -n "$1" exec -i "$2" -- bash -c 'cat >/tmp/client; rm -f /tmp/stop /tmp/udp /tmp/tcp /tmp/never /tmp/failed; setsid bash /tmp/client "$@" </dev/null >/dev/null 2>&1 &' - "$server" "$3" "$4" <<<"$traffic_client"; }
