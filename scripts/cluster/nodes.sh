# Sourced by scripts/cluster-test: what nodes go through: many pods at once, agents killed and
# replaced, runtimes restarted, reboots, and nftcni taken off.

# residue NODE: what a node holds per pod, as numbers that must come back
residue() {
  echo "attached $(nftcni_on "$1" debug pods -o json | jq '[.[] | select(.interfaces)] | length')"
  echo "leases $(nftcni_on "$1" debug ipam -o json | jq '[.. | objects | select(has("address"))] | length')"
  has_nodes || return 0
  echo "links $(on "$1" ip -j link | jq '[.[] | select(.ifname | test("^nft[0-9a-f]{12}$"))] | length')"
  echo "routes $({ on "$1" ip route show proto 157; on "$1" ip -6 route show proto 157; } | grep -c 'dev nft[0-9a-f]\{12\}')"
  on "$1" sh -c 'command -v nft' >/dev/null || return 0
  echo "elements $(on "$1" nft -j list table inet nftcni | jq '[.nftables[] | (.set // .map) | select(. != null) | select(.name | test("^(local|bound|self|masquerade|isolated|host)")) | (.elem // []) | length] | add')"
}

# 100 pods on one node at once, twice.
check_many() {
  local ns=many node count=${MANY:-100} round began
  node=$(first_node)
  new_namespace $ns
  deny_all $ns
  residue "$node" >"$work/before"
  for round in 1 2; do
    began=$SECONDS
    many_pods $ns "$node" "$count"
    check "$count pods on $node, round $round" k -n $ns rollout status deploy/many --timeout=400s
    echo "     $((SECONDS - began)) s"
    residue "$node" | paste -sd, | sed 's/^/     /; s/,/, /g'
    k -n $ns delete deploy many >/dev/null
    k -n $ns wait --for=delete pod -l app=many --timeout=300s >/dev/null
  done
  check "nothing leaked on $node: $(paste -sd, "$work/before")" same_residue "$node"
  drop_namespace $ns
}

# many_pods NAMESPACE NODE COUNT
many_pods() {
  k -n "$1" apply -f - >/dev/null <<K
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: $3
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec: {nodeSelector: {kubernetes.io/hostname: $2}, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
K
}

same_residue() {
  local try
  for try in 1 2 3 4 5 6 7 8 9 10; do
    residue "$1" >"$work/after"
    if cmp -s "$work/before" "$work/after"; then return 0; fi
    sleep 1
  done
  diff "$work/before" "$work/after"
  return 1
}

# The agents of all nodes are killed again and again while pods talk.
check_kill() {
  has_nodes || { not_run kill "no privileged pods here"; return; }
  new_namespace kill
  traffic_pods kill
  under_traffic kill 5 kill_agents
  check "kill: agents serve again" within 200 agents_ready
  drop_namespace kill
}

# Another version of nftcni takes over and back, twice, while pods talk: FROM=COMMIT's, or that
# of this tree under another name.
check_upgrade() {
  local n
  other=${NEXT_IMAGE:-}
  if [ -z "$bench" ]; then
    [ "$form" = daemonset ] && [ -n "$other" ] || { not_run upgrade "set NEXT_IMAGE to another image of nftcni, and use the DaemonSet"; return; }
  else
    other_version
  fi
  new_namespace upgrade
  traffic_pods upgrade
  this_one=yes
  under_traffic upgrade 4 switch_version
  for n in $(node_names); do
    check "upgrade: a new pod on $n" run_pod upgrade "after-$n" "$n"
    check "upgrade: the table on $n is right" within 10 nftcni_on "$n" debug verify
  done
  drop_namespace upgrade
}

# other_version: its binary in $work/other, or its image in $other
other_version() {
  if [ -n "${FROM:-}" ]; then
    mkdir -p "$work/source"
    git archive "$FROM" | tar -x -C "$work/source"
    (cd "$work/source" && go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$FROM" -o "$work/other" .)
  else
    go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=another" -o "$work/other" .
  fi
  [ "$form" = daemonset ] || return 0
  other=ghcr.io/nftcni/nftcni:another
  NFTCNI_BINARY=$work/other scripts/image "$work/other.tar" $other >/dev/null
  "$bench/load" "$work/other.tar" >/dev/null
}

# switch_version: to the one that does not run, on every node
switch_version() {
  local n binary=$work/other tag=$other want=${FROM:-another}
  if [ "$this_one" = yes ]; then
    this_one=no
  else
    this_one=yes binary=${NFTCNI:-} tag=${this_image:-} want=$("${NFTCNI:-true}" version | awk '/^nftcni/ {print $2}')
  fi
  if [ "$form" = daemonset ]; then
    this_image=${this_image:-$(k -n kube-system get ds nftcni -o 'jsonpath={.spec.template.spec.containers[0].image}')}
    k -n kube-system set image ds/nftcni install="$tag" sysctl="$tag" agent="$tag" >/dev/null
    k -n kube-system rollout status ds/nftcni --timeout=180s >/dev/null
    [ -n "$bench" ] || return 0
  else
    for n in $(node_names); do
      on "$n" "$binary" install $(install_arguments) >/dev/null
      stop_agent "$n" TERM
      start_agent "$n"
      within 30 on "$n" /opt/cni/bin/nftcni agent ready >/dev/null
    done
  fi
  for n in $(node_names); do
    check "upgrade: $n runs $want" test "$(agent_version "$n")" = "$want"
  done
}

agent_version() { on "$1" sh -c '/proc/$(pgrep -of "[n]ftcni agent --config")/exe version' | awk '/^nftcni/ {print $2}'; }
install_arguments() { echo "--kubeconfig /etc/nftcni/kubeconfig"; [ "$form" != policy ] || echo --policy-only; }

# containerd and kubelet are killed while pods talk.
check_restart() {
  local n
  if [ -z "$bench" ] && ! on "$(first_node)" systemctl is-active kubelet >/dev/null 2>&1; then
    not_run restart "needs privileged pods, and a kubelet that systemd runs"
    return
  fi
  new_namespace restart
  traffic_pods restart
  under_traffic restart 5 restart_runtimes
  for n in $(node_names); do
    check "restart: a new pod on $n" run_pod restart "after-$n" "$n"
  done
  drop_namespace restart
}

restart_runtimes() {
  local n
  for n in $(node_names); do
    if [ -n "$bench" ]; then
      restart_daemon "$n" containerd
      restart_daemon "$n" kubelet
    else
      on "$n" sh -c 'for u in containerd crio kubelet; do ! systemctl is-active $u >/dev/null || systemctl restart $u; done'
    fi
  done
}

# restart_daemon NODE NAME: kills it, and starts it again with the same arguments, as often as it
# ends in its first second: a kubelet does when its runtime is not there yet
restart_daemon() {
  on "$1" bash -c 'pid=$(pgrep -ox "$0") && cp /proc/$pid/cmdline /etc/kubernetes/arguments-$0 && kill -9 $pid
    while [ -e /proc/$pid ]; do sleep 0.1; done
    mapfile -d "" args </etc/kubernetes/arguments-$0
    exec </dev/null >>/etc/kubernetes/again.log 2>&1
    for i in 1 2 3 4 5; do
      setsid --fork "${args[@]}"
      sleep 1
      ! pgrep -ox "$0" || break
    done' "$2"
}

# A node loses its power: its processes and its network namespace go, its disk stays. Nobody
# who is denied gets in while its pods come back, and nothing of the old ones is left.
check_reboot() {
  local ns=reboot node pod kind got sent
  [ -n "$bench" ] || { not_run reboot "needs the nodes of the bench"; return; }
  node=$(last_node)
  new_namespace $ns
  traffic_pods $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
spec:
  replicas: 10
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec: {nodeName: $node, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80, --udp-port=80]}]}
K
  k -n $ns rollout status deploy/d --timeout=120s >/dev/null
  residue "$node" >"$work/before"
  # Their addresses may be others then: it asks all near that of a pod there.
  k -n $ns exec -i near -- bash -c 'cat >/tmp/client; setsid bash /tmp/client "$@" </dev/null >/tmp/answers 2>&1 &' - "$(pod_address $ns far)" <<<"$reboot_client"
  CLUSTER_BENCH=$bench FORM=$form PRIVATE_DIRS=$private_dirs scripts/cluster/reboot "$node"
  check "reboot: $node is Ready" within 90 node_ready_again "$node"
  check "reboot: pods of $node are back" within 120 pods_back $ns "$node"
  sleep 3
  k -n $ns exec near -- touch /tmp/stop
  for kind in udp tcp; do
    read -r got sent < <(within 30 k -n $ns exec near -- cat /tmp/$kind) || got=none sent=0
    check "reboot: $kind of a stranger while pods came back: $got of $sent answered" test "$got" = 0 -a "$sent" -gt 200
    [ "$got" = 0 ] || reboot_details $ns "$node"
  done
  for pod in $(k -n $ns get pods -l app=server -o name | head -4); do
    check "reboot: friend reaches ${pod#pod/}" within 5 k -n $ns exec friend -- nc -z -w 1 "$(pod_address $ns "${pod#pod/}")" 80
    check "reboot: stranger does not reach ${pod#pod/}" not k -n $ns exec near -- nc -z -w 1 "$(pod_address $ns "${pod#pod/}")" 80
  done
  check "reboot: nothing of before is left: $(paste -sd, "$work/before")" same_residue "$node"
  check "reboot: the table is right" within 10 nftcni_on "$node" debug verify
  drop_namespace $ns
}

# Packets and connections, one after another, to 40 addresses near that of a pod; a stranger
# sees no answer.
# shellcheck disable=SC2016
reboot_client='
case $1 in *:*) base=${1%:*}: ;; *) base=${1%.*}. ;; esac
going() { [ ! -e /tmp/stop ] && [ $SECONDS -lt 300 ]; }
udp() {
  local sent=0 got=0 i c
  for ((i = 2; i < 42; i++)); do eval "exec $((i + 10))<>/dev/udp/$base$i/80"; done
  while going; do
    for ((i = 12; i < 52; i++)); do
      sent=$((sent + 1))
      { echo hostname >&$i; } 2>/dev/null
      if read -r -t 0 -u $i && read -r -t 0.001 -n 1 -u $i c; then
        got=$((got + 1))
        echo "$base$((i - 10)) answered at $(TZ=UTC printf "%(%T)T").${EPOCHREALTIME#*[.,]}"
      fi
    done
    read -r -t 0.02 -u 4 || true
  done
  echo "$got $sent" >/tmp/udp.new; mv /tmp/udp.new /tmp/udp
}
tcp() {
  local sent=0 got=0 i p pids
  while going; do
    pids=
    for ((i = 2; i < 42; i++)); do
      (exec nc -z -w 1 "$base$i" 80) & pids="$pids $!"
    done
    for p in $pids; do sent=$((sent + 1)); if wait $p; then got=$((got + 1)); fi; done
  done
  echo "$got $sent" >/tmp/tcp.new; mv /tmp/tcp.new /tmp/tcp
}
mkfifo /tmp/never; exec 4<>/tmp/never
udp "$1" & tcp "$1" & wait'

# reboot_details NAMESPACE NODE: who answered a stranger when, and what the agent did then
reboot_details() {
  k -n "$1" exec near -- head -5 /tmp/answers
  k -n "$1" exec near -- tail -5 /tmp/answers
  k -n "$1" get pods -o wide --no-headers
  ! processes || on "$2" tail -60 /etc/kubernetes/nftcni-agent.log
} 2>&1 | sed 's/^/     /'

node_ready_again() { on "$1" true && k wait --for=condition=Ready "node/$1" --timeout=1s && nftcni_on "$1" agent ready; }
# pods_back NAMESPACE NODE: all there are Ready, each in another container than before
pods_back() { k -n "$1" get pods --field-selector "spec.nodeName=$2" -o json | jq -e 'all(.items[]; any(.status.conditions[]; .type == "Ready" and .status == "True") and .status.containerStatuses[0].restartCount > 0)' >/dev/null; }

# Without the DaemonSet pods stay connected, policy stays in force, and new pods wait.
check_removed() {
  [ "$form" = daemonset ] || return 0
  [ -n "$bench" ] || { not_run removed "would take nftcni off your cluster"; return; }
  new_namespace removed
  traffic_pods removed
  k delete -f deploy/nftcni.yaml --wait=true >/dev/null
  k -n kube-system wait --for=delete pod -l app.kubernetes.io/name=nftcni --timeout=60s >/dev/null 2>&1 || true
  under_traffic removed 3 true
  check "removed: a new pod waits" not run_pod removed new "$(first_node)" 8
  check "removed: uninstall --check says what remains" remains "$(first_node)"
  k apply -f deploy/nftcni.yaml >/dev/null
  check "removed: it starts when nftcni is back" k -n removed wait --for=condition=Ready pod/new --timeout=120s
  drop_namespace removed
}

# remains NODE: uninstall --check lists files, links and the table, and fails
remains() {
  on "$1" /opt/cni/bin/nftcni uninstall --check >"$work/remains" && return 1
  says 'inet nftcni' "$work/remains" && says '/opt/cni/bin/nftcni' "$work/remains" && says 'nft[0-9a-f]\{12\}' "$work/remains"
}

# The node afterwards is as it was before.
check_uninstall() {
  local n
  [ -n "$bench" ] || { not_run uninstall "would take nftcni off your cluster"; return; }
  [ "$form" != daemonset ] || k delete -f deploy/nftcni.yaml --wait=true >/dev/null
  for n in $(node_names); do
    if [ "$form" = daemonset ]; then within 60 not on "$n" pgrep -f '[n]ftcni agent'; else stop_agent "$n" TERM; fi
    check "uninstall on $n" on "$n" "$NFTCNI" uninstall --force
    check "uninstall on $n left nothing" on "$n" "$NFTCNI" uninstall --check
  done
}
