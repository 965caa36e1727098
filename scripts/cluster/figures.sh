# Sourced by scripts/cluster-test: figures of a real cluster (docs/performance-cluster.md).
# A check of its own, not part of "all": a busy machine has no figures.

check_figures() {
  echo "     load $(cut -d' ' -f1-3 /proc/loadavg), $(nproc) CPUs, $(k get nodes --no-headers | wc -l) nodes"
  figures_policy
  figures_first_answer
  figures_many
}

# A NetworkPolicy from the API call to its being in force on every node, seen by a pod.
figures_policy() {
  local ns=figures n servers=()
  new_namespace $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: ServiceAccount
metadata: {name: probe}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: probe}
rules: [{apiGroups: [networking.k8s.io], resources: [networkpolicies], verbs: [create, delete]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: probe}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: probe}
subjects: [{kind: ServiceAccount, name: probe, namespace: $ns}]
---
apiVersion: v1
kind: Pod
metadata: {name: probe}
spec: {serviceAccountName: probe, nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
K
  for n in $(node_names); do
    k -n $ns apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: server-$n, labels: {app: server}}, spec: {nodeName: $n, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80, --udp-port=80]}]}}"
  done
  k -n $ns wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  for n in $(node_names); do servers+=("$(h "$(pod_address $ns "server-$n")"):80"); done
  go build -trimpath -o "$work/probe-in-pod" scripts/cluster/probe.go
  k -n $ns exec -i probe -- sh -c 'cat >/tmp/probe && chmod +x /tmp/probe' <"$work/probe-in-pod"
  check "figures: policies" k -n $ns exec probe -- sh -c '/tmp/probe "$@" >/tmp/said' - $ns "${ROUNDS:-200}" "${servers[@]}"
  k -n $ns exec probe -- cat /tmp/said | sed 's/^/     /'
}

# Pods that are let in by their label start on one node and send to another from their first
# instruction, once in 5 ms: how many packets are lost before the first answer.
figures_first_answer() {
  local ns=figures i count=${STARTS:-40} server
  run_pod $ns late "$(last_node)" >/dev/null
  k -n $ns apply -f - >/dev/null <<<'{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: late}, spec: {podSelector: {matchLabels: {app: late}}, ingress: [{from: [{podSelector: {matchLabels: {app: early}}}]}]}}'
  sleep 2
  server=$(pod_address $ns late)
  for ((i = 0; i < count; i++)); do
    k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: early-$i, labels: {app: early}}
spec:
  nodeName: $(first_node)
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers:
    - name: c
      image: $image
      command: [bash, -c, "exec 3<>/dev/udp/$server/80; for ((n = 0; n < 2000; n++)); do echo hostname >&3; read -r -t 0.005 -n 1 -u 3 c && break; done; echo lost \$n"]
K
  done
  k -n $ns wait --for=jsonpath='{.status.phase}'=Succeeded pod -l app=early --timeout=180s >/dev/null || true
  for ((i = 0; i < count; i++)); do k -n $ns logs "early-$i" || true; done | awk '/^lost/ {print $2}' | sort -n >"$work/lost"
  echo "     ADD -> allowed on another node: of $(wc -l <"$work/lost") pods $(grep -cx 0 "$work/lost") lost nothing; packets lost, one in 5 ms: p50 $(at 50 "$work/lost") p99 $(at 99 "$work/lost") max $(tail -1 "$work/lost")"
  drop_namespace $ns
}

# at PERCENT FILE: of sorted numbers
at() { awk -v p="$1" '{v[NR] = $1} END {print v[int((NR - 1) * p / 100) + 1]}' "$2"; }

# 100 pods of one Deployment, with nftcni on one node and the reference plugin ptp on the other,
# in turn.
figures_many() {
  local ns=figures-many round count=${MANY:-100} began ptp ours
  ptp=$(first_node) ours=$(last_node) # the first node is a little faster: run it both ways
  [ "${PTP_ON:-first}" = first ] || { ptp=$(last_node) ours=$(first_node); }
  [ -n "$bench" ] && [ "$form" = install ] || { not_run "figures: $count pods beside ptp" "needs the bench in form install"; return; }
  new_namespace $ns
  reference_node "$ptp"
  k -n kube-system delete pod -l k8s-app=kube-dns >/dev/null
  k -n kube-system rollout status deploy/coredns --timeout=60s >/dev/null
  for round in 1 2 3; do
    for n in $(first_node) $(last_node); do
      began=$(date +%s%N)
      many_pods $ns "$n" "$count"
      k -n $ns rollout status deploy/many --timeout=500s >/dev/null
      echo "$((($(date +%s%N) - began) / 1000000))" | tee -a "$work/many.$n" | sed "s/^/     $count pods on $n, ms: /"
      k -n $ns delete deploy many >/dev/null
      k -n $ns wait --for=delete pod -l app=many --timeout=300s >/dev/null
    done
  done
  for n in $(first_node) $(last_node); do sort -n -o "$work/many.$n" "$work/many.$n"; done
  echo "     median of 3: ptp on $ptp $(at 50 "$work/many.$ptp") ms, nftcni on $ours $(at 50 "$work/many.$ours") ms"
  drop_namespace $ns
}

# reference_node NODE: the reference plugin ptp there, and no nftcni
reference_node() {
  stop_agent "$1" TERM
  on "$1" "$NFTCNI" uninstall --force >/dev/null
  on "$1" cp -a "$BENCH_DIR/bin/cni/." /opt/cni/bin/
  on "$1" env NODE_NAME="$1" CNI_CONF_DIR=/etc/cni/net.d REF_CNI=ptp \
    POD_CIDRS="$(k get node "$1" -o 'jsonpath={.spec.podCIDRs[*]}' | tr ' ' ,)" bash "$bench/hook-reference"
}
