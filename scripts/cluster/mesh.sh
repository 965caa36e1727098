# Sourced by scripts/cluster-test: node to node with three nodes, direct and through VXLAN: what
# happens to nodes, their addresses and links, and that it is mended at once.

check_mesh() {
  local mode n
  if ! processes || [ "$(node_names | wc -l)" -lt 3 ]; then
    not_run mesh "it deletes devices, addresses and nodes: only with --form install --nodes 3, in a cluster of its own"
    return
  fi
  new_namespace mesh
  for n in $(node_names); do check "mesh: a pod on $n" run_pod mesh "at-$n" "$n"; done
  for mode in auto vxlan; do
    for n in $(node_names); do mesh_configure "$n" "{mode: $mode}"; done
    check "mesh $mode: every pod reaches every other with its own address" within 20 mesh_pairs
    check "mesh $mode: routes are what the mode says" within 5 mesh_routes "$mode"
    mesh_policy "$mode"
    mesh_breaks "$mode"
    mesh_node_leaves "$mode"
    mesh_node_moves "$mode"
  done
  for n in $(node_names); do mesh_configure "$n" "{}"; done
  drop_namespace mesh
  check_mesh_thousand
}

# A thousand Node objects: the routes of one node to all of them, after they came and after its agent
# starts anew without a route; they go with their objects.
check_mesh_thousand() {
  local first count=997 rss
  if ! processes || [ "$family" = ipv6 ]; then
    not_run mesh_thousand "it makes a thousand Node objects: only with --form install in a cluster of its own that has IPv4"
    return
  fi
  first=$(first_node)
  jq -n --argjson n $count '{apiVersion: "v1", kind: "List", items: [range($n) | "10.\(100 + (. / 256 | floor)).\(. % 256).0/24" as $c | {apiVersion: "v1", kind: "Node",
    metadata: {name: "fake-\(.)", labels: {fake: "yes"}}, spec: {podCIDR: $c, podCIDRs: [$c], unschedulable: true},
    status: {addresses: [{type: "InternalIP", address: "172.16.\(. / 256 | floor).\(. % 256)"}]}}]}' | k create -f - >/dev/null
  check "mesh: routes to $count more nodes" within 10 mesh_fakes "$first" $count
  stop_agent "$first" TERM
  on "$first" ip route flush proto 157 metric 64
  start_agent "$first"
  # shellcheck disable=SC2016
  on "$first" timeout 30 bash -c 'began=$(date +%s%N); until [ "$(ip route show proto 157 | grep -c "^10\.10[0-3]\.")" -ge "$0" ]; do sleep 0.02; done
    echo "     mesh: the routes to $0 more nodes are there $((($(date +%s%N) - began) / 1000000)) ms after the start of the agent"' $count
  rss=$(on "$first" bash -c 'awk "/^VmRSS|^VmHWM/ {printf \"%s %d MiB \", \$1, \$2 / 1024}" /proc/$(pgrep -of "[n]ftcni agent --config")/status')
  echo "     mesh: the agent's memory: $rss"
  k delete node -l fake=yes --wait=false >/dev/null
  check "mesh: and none without them" within 10 mesh_fakes "$first" 0
}

mesh_fakes() { [ "$(on "$1" ip route show proto 157 | grep -c '^10\.10[0-3]\.')" = "$2" ]; }

# mesh_configure NODE MAPPING: the agent's mesh setting; the agent starts again with it
mesh_configure() {
  on "$1" sed -i '/^mesh:/d' /etc/nftcni/agent.yaml
  on "$1" sh -c 'echo "mesh: $0" >>/etc/nftcni/agent.yaml' "$2"
  stop_agent "$1" TERM
  start_agent "$1"
  within 30 on "$1" /opt/cni/bin/nftcni agent ready >/dev/null
}

# mesh_pairs: HTTP from every pod to every address of every other; the server sees the client's
# own address
mesh_pairs() {
  local pods from own others seen
  pods=$(k -n mesh get pods -o json)
  for from in $(jq -r '.items[].metadata.name' <<<"$pods"); do
    own=$(jq -r --arg n "$from" '.items[] | select(.metadata.name == $n) | .status.podIPs[].ip' <<<"$pods")
    others=$(jq -r --arg n "$from" '.items[] | select(.metadata.name != $n) | .status.podIPs[].ip' <<<"$pods")
    # shellcheck disable=SC2016,SC2086
    seen=$(k -n mesh exec "$from" -- bash -c 'for a in "$@"; do case $a in *:*) a="[$a]" ;; esac
      curl -sf -m 2 "http://$a:80/clientip" || echo "no answer from $a"; echo; done' - $others | without_port | sort -u)
    [ "$seen" = "$(sort -u <<<"$own")" ] || { echo "$from has $own; the others see: $seen"; return 1; }
  done
}

# mesh_routes MODE: how each node reaches the pods of the others; all of the bench's are on one link
mesh_routes() {
  local n dev other cidr
  for n in $(node_names); do
    other=$(k get nodes -o json | jq -r --arg n "$n" '.items[] | select(.metadata.name != $n) | .spec.podCIDRs[]')
    for cidr in $other; do
      case $1,$cidr in auto,*) dev=eth0 ;; *,*:*) dev=vxnftcni6 ;; *) dev=vxnftcni4 ;; esac
      on "$n" ip route get "$(pod_inside "$cidr")" | grep -q "dev $dev" || { echo "$n does not reach $cidr by $dev"; on "$n" ip route get "$(pod_inside "$cidr")"; on "$n" tail -3 /etc/kubernetes/nftcni-agent.log; return 1; }
    done
  done
}

# pod_inside CIDR: some address of a network
pod_inside() { case $1 in *:*) echo "${1%%/*}99" ;; *) sed 's|\.[0-9]*/.*|.99|' <<<"$1" ;; esac }

# One pod is allowed by its labels, on whatever node it is; another is not.
mesh_policy() {
  local server friend stranger url
  server=at-$(first_node) friend=at-$(last_node) stranger=at-$(node_names | sed -n 2p)
  k -n mesh apply -f - >/dev/null <<<"{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: one}, spec: {podSelector: {matchLabels: {app: $server}}, ingress: [{from: [{podSelector: {matchLabels: {app: $friend}}}]}]}}"
  for url in $(k -n mesh get pod "$server" -o json | jq -r '.status.podIPs[].ip'); do
    url=http://$(h "$url"):80/hostname
    check "mesh $1: policy denies a pod of another node ($url)" gone_within 5 ask mesh "$stranger" "$url"
    check "mesh $1: policy lets one in ($url)" ask mesh "$friend" "$url"
  done
  k -n mesh delete networkpolicy one >/dev/null
}

mesh_breaks() {
  local n d
  n=$(last_node)
  for d in vxnftcni4 vxnftcni6; do
    on "$n" ip link show "$d" >/dev/null 2>&1 || continue
    on "$n" ip link delete "$d"
    check "mesh $1: $d deleted by hand is back within a second" within 1 on "$n" ip link show "$d"
  done
  check "mesh $1: and everybody is reached" within 3 mesh_pairs
  on "$n" ip link set eth0 down
  on "$n" ip link set eth0 up
  mesh_uplink "$n"
  check "mesh $1: an uplink that flapped" within 15 mesh_pairs
}

# mesh_uplink NODE: what the node's administrator has configured and the kernel forgets with the link
mesh_uplink() {
  local a
  for a in $(k get node "$1" -o json | jq -r '.status.addresses[] | select(.type == "InternalIP") | .address'); do
    case $a in
    *:*) on "$1" ip -6 addr replace "$a/64" dev eth0 nodad; on "$1" ip -6 route replace default via "${a%:*}:1" ;;
    *) on "$1" ip route replace default via "${a%.*}.1" ;;
    esac
  done
}

# A node leaves, and comes back as it was, with a token of its own as any node that joins.
mesh_node_leaves() {
  local n first
  n=$(last_node) first=$(first_node)
  k get node "$n" -o json | jq 'del(.metadata.resourceVersion, .metadata.uid, .metadata.creationTimestamp, .metadata.managedFields)' >"$work/node.json"
  k delete node "$n" --wait=true >/dev/null
  check "mesh $1: nobody knows a node that left" within 2 mesh_forgot "$first" "$work/node.json"
  k create -f "$work/node.json" >/dev/null
  # The old token was bound to the Node object that is gone.
  k -n kube-system create token nftcni --bound-object-kind Node --bound-object-name "$n" --duration 24h | on "$n" sh -c 'cat >/etc/nftcni/token'
  check "mesh $1: it came back" within 20 mesh_pairs
}

# mesh_forgot NODE FILE: no route leads to the pods of the node in the file
mesh_forgot() {
  local c
  for c in $(jq -r '.spec.podCIDRs[]' "$2"); do
    ! on "$1" ip route show "$c" | grep -qv unreachable && ! on "$1" ip -6 route show "$c" | grep -qv unreachable || return 1
  done
}

# A node is sent to at another address than its Node object has: its agent says so, and the others follow.
mesh_node_moves() {
  local n first a
  n=$(last_node) first=$(first_node)
  a=$(node_address "$n")
  case $a in *:*) a=${a%:*}:f3 on_link=/64 ;; *) a=${a%.*}.213 on_link=/24 ;; esac
  on "$n" ip addr replace "$a$on_link" dev eth0
  mesh_configure "$n" "{mode: $1, nodeAddresses: [\"$a\"]}"
  check "mesh $1: the node says where to send to" within 5 mesh_says "$n" "$a"
  check "mesh $1: the others send there" within 5 mesh_sends "$first" "$n" "$a"
  check "mesh $1: pods reach each other by the new address" within 10 mesh_pairs
  on "$n" ip addr delete "$a$on_link" dev eth0
  mesh_configure "$n" "{mode: $1}"
  check "mesh $1: the node takes it back" within 5 mesh_says "$n" ""
  check "mesh $1: and is reached as before" within 10 mesh_pairs
}

mesh_says() { [ "$(k get node "$1" -o json | jq -r '.metadata.annotations["nftcni.io/mesh-addresses"] // ""')" = "$2" ]; }

# mesh_sends NODE PEER ADDRESS: what the node's agent says of the way to its peer
mesh_sends() { on "$1" curl -s --unix-socket /run/nftcni/agent.sock http://agent/v1/mesh | jq -e --arg p "$2" --arg a "$3" 'any(.report.paths[]; .peer == $p and .address == $a)' >/dev/null; }
