# Sourced by scripts/cluster-test: what an attachment carries besides addresses: host ports and
# bandwidth. With `network: none` both are the other plugin's business.

# A Deployment with a hostPort, beside kube-proxy: the client outside keeps its address, policy
# judges that, and a UDP flow follows the pod that comes after.
check_hostports() {
  local ns=hostports node url seen old new
  node=$(last_node)
  url=http://$(h "$(node_address "$node")"):18080/clientip
  new_namespace $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: apps/v1
kind: Deployment
metadata: {name: server}
spec:
  strategy: {type: Recreate}
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      nodeName: $node
      terminationGracePeriodSeconds: 0
      containers:
        - name: c
          image: $image
          args: [netexec, --http-port=8080, --udp-port=8081]
          ports: [{name: web, containerPort: 8080, hostPort: 18080}, {name: dgram, containerPort: 8081, hostPort: 18081, protocol: UDP}]
---
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
K
  k -n $ns rollout status deploy/server --timeout=60s >/dev/null
  k -n $ns wait --for=condition=Ready pod/stranger --timeout=60s >/dev/null
  if ! seen=$(within 5 outside "$url" | without_port); then
    if [ -n "$bench" ]; then check "hostPort: open without policy" outside "$url"; else not_run hostports "this machine does not reach $url"; fi
    drop_namespace $ns
    return
  fi
  echo "ok   hostPort: open without policy, and the server sees the client: $seen"
  check "hostPort: a pod of another node gets in" ask $ns stranger "$url"
  let_in_all_ports $ns nobody "$(block 192.0.2.1)"
  check "hostPort: denied by policy" gone_within 5 outside "$url"
  let_in_all_ports $ns outside "$(block "$seen")"
  check "hostPort: policy lets the client's own address in" within 5 outside "$url"
  check "hostPort: and not a pod" not ask $ns stranger "$url"
  old=$(k -n $ns get pods -l app=server -o 'jsonpath={.items[0].metadata.name}')
  udp_flow "$(node_address "$node")" 18081 >"$work/flow" &
  sleep 1
  k -n $ns rollout restart deploy/server >/dev/null
  k -n $ns rollout status deploy/server --timeout=60s >/dev/null
  new=$(k -n $ns get pods -l app=server --field-selector status.phase=Running -o 'jsonpath={.items[0].metadata.name}')
  check "hostPort: the next pod has it" within 5 outside "$url"
  sleep 1
  kill $! 2>/dev/null || true
  check "hostPort: a UDP flow reached the old pod" grep -q "$old" "$work/flow"
  check "hostPort: the same flow reaches the new pod" grep -q "$new" "$work/flow"
  k -n $ns delete deploy server >/dev/null
  k -n $ns wait --for=delete pod -l app=server --timeout=60s >/dev/null 2>&1 || true
  check "hostPort: closed with the pod" gone_within 5 outside "$url"
  drop_namespace $ns
}

let_in_all_ports() { k -n "$1" apply -f - >/dev/null <<<"{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: $2}, spec: {podSelector: {matchLabels: {app: server}}, ingress: [{from: [$3]}]}}"; }

# udp_flow ADDRESS PORT: asks for the host name on one UDP flow, five times a second for a minute
# shellcheck disable=SC2016
udp_flow() {
  local in=()
  [ -z "$bench" ] || in=(nsenter "--net=/run/netns/${BENCH_PREFIX:-kb}-fabric")
  exec "${in[@]}" bash -c 'exec 3<>/dev/udp/$0/$1; for ((i = 0; i < 300; i++)); do { echo hostname >&3; } 2>/dev/null; timeout 0.2 dd bs=512 count=1 <&3 2>/dev/null; echo; sleep 0.15; done' "$1" "$2"
}

# The bandwidth annotations hold in both directions, and leave nothing on the node.
check_bandwidth() {
  local ns=bandwidth node before ms pod
  node=$(last_node)
  new_namespace $ns
  has_nodes && before=$(shapers "$node")
  for pod in free limited; do
    k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata:
  name: $pod
  annotations: $([ $pod = free ] && echo '{}' || echo '{kubernetes.io/ingress-bandwidth: 8M, kubernetes.io/egress-bandwidth: 8M}')
spec:
  nodeName: $node
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: $image, args: [netexec, --http-port=80]}]
K
  done
  run_pod $ns peer "$(first_node)" >/dev/null
  k -n $ns wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  for pod in free limited; do
    ms=$(transfer $ns peer $pod) || ms=0
    check "bandwidth: 3 MB to pod $pod in $ms ms" took $pod "$ms"
    ms=$(transfer $ns $pod peer) || ms=0
    check "bandwidth: 3 MB from pod $pod in $ms ms" took $pod "$ms"
  done
  k -n $ns delete pod limited --wait=true >/dev/null
  if has_nodes; then check "bandwidth: no qdisc and no ifb is left" within 5 same_shapers "$node" "$before"; fi
  drop_namespace $ns
}

# took POD MS: 3 MB at 8 Mbit/s take 3 s, less what the bucket holds
took() { if [ "$1" = free ]; then [ "$2" -gt 0 ] && [ "$2" -lt 2000 ]; else [ "$2" -ge 2000 ]; fi; }

# transfer NAMESPACE FROM TO: milliseconds that 3 MB take
transfer() {
  k -n "$1" exec "$3" -- bash -c 'nc -l -w 60 7000 >/dev/null 2>&1 </dev/null &' || return 1
  k -n "$1" exec "$2" -- bash -c '
    for i in 1 2 3 4 5 6 7 8 9 10; do
      began=${EPOCHREALTIME/./}
      if head -c 3000000 /dev/zero | nc -N -w 30 "$0" 7000; then echo $(((${EPOCHREALTIME/./} - began) / 1000)); exit; fi
      sleep 0.2
    done; exit 1' "$(pod_address "$1" "$3")"
}

shapers() { on "$1" tc -j qdisc show | jq '[.[] | select(.kind == "tbf" or .kind == "ingress")] | length'; on "$1" ip -j link show type ifb | jq length; }
same_shapers() { [ "$(shapers "$1")" = "$2" ]; }
