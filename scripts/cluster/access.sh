# Sourced by scripts/cluster-test: how the checks reach a node, and a client outside.
# Each check takes both from here, so that it runs in the bench and in a cluster of others.

# on NODE COMMAND...: as root in the namespaces of a node. In a cluster of others by a privileged
# pod of that node, which this makes; has_nodes says whether there is one. By env, because
# busybox's nsenter would run its own "ip".
on() {
  if [ -n "$bench" ]; then
    "$bench/x" "$@"
    return
  fi
  local node=$1 path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  shift
  k -n nftcni-test exec "node-$node" -- nsenter -t 1 -m -u -i -n -- /usr/bin/env "PATH=$path" "$@"
}

# nftcni_on NODE ARGS...: the command line on a node, or in its agent's container
nftcni_on() {
  local node=$1 pod
  shift
  if has_nodes; then
    on "$node" /opt/cni/bin/nftcni "$@"
    return
  fi
  pod=$(k -n kube-system get pods -l app.kubernetes.io/name=nftcni --field-selector "spec.nodeName=$node" -o 'jsonpath={.items[0].metadata.name}')
  k -n kube-system exec "$pod" -c agent -- /nftcni "$@"
}

has_nodes() { [ -n "$bench" ] || [ "${node_pods:-}" = yes ]; }

# foreign: the cluster that KUBECONFIG names: which form, and whether nodes let us in
foreign() {
  local n
  kubectl create token --help >/dev/null 2>&1 || {
    echo "$(command -v kubectl || echo kubectl) is missing or older than the clusters that nftcni is for: install kubectl 1.31 or newer" >&2
    exit 2
  }
  k get nodes >/dev/null
  form=systemd
  if k -n kube-system get ds nftcni >/dev/null 2>&1; then form=daemonset; fi
  new_namespace nftcni-test
  k label --overwrite ns nftcni-test pod-security.kubernetes.io/enforce=privileged >/dev/null
  trap 'k delete ns nftcni-test --wait=false >/dev/null 2>&1; rm -rf "$work"' EXIT
  for n in $(node_names); do
    k -n nftcni-test apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: node-$n}
spec:
  nodeName: $n
  hostNetwork: true
  hostPID: true
  terminationGracePeriodSeconds: 0
  tolerations: [{operator: Exists}]
  containers: [{name: c, image: $image, args: [pause], securityContext: {privileged: true}}]
K
  done
  node_pods=yes
  if ! k -n nftcni-test wait --for=condition=Ready pod --all --timeout=120s >/dev/null || ! on "$(first_node)" true; then
    node_pods=no
  fi
}

# outside URL: an HTTP answer to a client that is no node and no pod: the bench's fabric, or
# the machine that this runs on
outside() {
  if [ -n "$bench" ]; then
    nsenter --net="/run/netns/${BENCH_PREFIX:-kb}-fabric" curl -sf -m 3 "$1"
  else
    curl -sf -m 3 "$1"
  fi
}

# processes: whether agents are processes that the bench started, without a service manager
processes() { case $form in install | policy | migrate) [ -n "$bench" ] ;; *) false ;; esac }

agents_ready() {
  local n
  for n in $(node_names); do nftcni_on "$n" agent ready || return 1; done
}

# kill_agents ends every agent with SIGKILL; systemd or the kubelet start it again, and where the
# bench has neither for it, this function does.
kill_agents() {
  local n
  for n in $(node_names); do
    stop_agent "$n" KILL
    ! processes || start_agent "$n"
  done
}

# stop_agent NODE SIGNAL: and wait until it is gone
stop_agent() {
  local pid
  pid=$(on "$1" pgrep -f '[n]ftcni(-agent)? (agent )?--config' | head -1) || true
  [ -n "$pid" ] || return 0
  on "$1" kill "-$2" "$pid" 2>/dev/null || return 0
  gone_within 20 on "$1" kill -0 "$pid"
}

start_agent() {
  on "$1" setsid --fork bash -c 'exec </dev/null >>/etc/kubernetes/nftcni-agent.log 2>&1; exec $(sed -n s/^ExecStart=//p /etc/systemd/system/nftcni-agent.service)'
}

# ask NAMESPACE POD URL: an HTTP answer in time
ask() { k -n "$1" exec "$2" -- curl -sf -m 3 "$3"; }
not() { ! "$@"; }
h() { case $1 in *:*) echo "[$1]" ;; *) echo "$1" ;; esac }
node_names() { k get nodes -o 'jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}'; }
first_node() { node_names | sed -n 1p; } # head would end kubectl early, and so the script
last_node() { node_names | tail -1; }
pod_address() { k -n "$1" get pod "$2" -o 'jsonpath={.status.podIP}'; }
new_namespace() { k create ns "$1" --dry-run=client -o yaml | k apply -f - >/dev/null; }
drop_namespace() { k delete ns "$1" --wait=true --timeout=120s >/dev/null; }
deny_all() { k -n "$1" apply -f - <<<'{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny}, spec: {podSelector: {}, policyTypes: [Ingress, Egress]}}' >/dev/null; }

# run_pod NAMESPACE NAME NODE [SECONDS]: a pod that serves HTTP, ready in that time
run_pod() {
  k -n "$1" apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: $2, labels: {app: $2}}, spec: {nodeName: $3, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80, --udp-port=80]}]}}"
  k -n "$1" wait --for=condition=Ready "pod/$2" --timeout="${4:-90}s"
}

# within SECONDS COMMAND: the command succeeds from some moment on
within() {
  local end=$((SECONDS + $1))
  shift
  while [ $SECONDS -lt $end ]; do
    if "$@" 2>/dev/null; then return 0; fi
    sleep 1
  done
  "$@"
}

# gone_within SECONDS COMMAND: the command fails from some moment on
gone_within() {
  local end=$((SECONDS + $1))
  shift
  while [ $SECONDS -lt $end ]; do "$@" >/dev/null 2>&1 || return 0; done
  return 1
}

# says PATTERN FILE: shows the file if it does not
says() { grep -q "$1" "$2" || { cat "$2"; return 1; }; }
