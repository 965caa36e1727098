# Sourced by scripts/cluster-test: a cluster on this machine (../shared/cluster, or where
# CLUSTER_BENCH says) with nftcni in it, in the form that --form names.

# Folders that nftcni writes and that the bench's nodes would otherwise share with the machine.
private_dirs="/var/lib/nftcni /etc/nftcni /usr/local/bin /etc/systemd /etc/NetworkManager /etc/sysctl.d"

bench_up() {
  bench=${CLUSTER_BENCH:-$(cd .. && pwd)/shared/cluster}
  export BENCH_DIR=${BENCH_DIR:-${TMPDIR:-/tmp}/kb-bench} BENCH_FAMILY=$family
  [ -x "$bench/up" ] && [ -x "$BENCH_DIR/bin/kubelet" ] || {
    echo "no test cluster here: set CLUSTER_BENCH to the bench's scripts and BENCH_DIR to where its 'build' put the binaries, or KUBECONFIG to a cluster of yours" >&2
    exit 2
  }
  if [ "${REUSE:-0}" = 1 ]; then # a cluster that KEEP=1 left
    KEEP=1 NFTCNI=$work/nftcni
    trap 'rm -rf "$work"' EXIT
    [ "$form" != install ] || upgrade
    return
  fi
  local made=() d
  for d in $private_dirs; do [ -e "$d" ] || { mkdir -p "$d"; made+=("$d"); }; done
  bench_made=("${made[@]}")
  trap bench_down EXIT
  mkdir "$work/bin"
  # The runtime calls the plugin "loopback" for every pod, whatever the network is.
  cp "$BENCH_DIR/bin/cni/loopback" "$work/bin/"
  built
  export NFTCNI=$work/nftcni NFTCNI_MANIFEST=$PWD/deploy/nftcni.yaml PRIVATE_DIRS=$private_dirs FORM=$form STATIC_ROUTES=${STATIC_ROUTES:-0}
  export BENCH_CNI_BIN_DIR=$work/bin BENCH_CNI_HOOK=$PWD/scripts/cluster/node-hook BENCH_CNI_AGENT= BENCH_NO_WAIT=0 BENCH_IMAGES=
  case $form in
  install) BENCH_CNI_AGENT='$(sed -n s/^ExecStart=//p /etc/systemd/system/nftcni-agent.service)' ;;
  migrate) # a node with the reference plugins on a bridge, as flannel uses them
    BENCH_CNI_BIN_DIR=$BENCH_DIR/bin/cni REF_CNI=bridge REFERENCE_HOOK=$bench/hook-reference
    export REF_CNI REFERENCE_HOOK
    ;;
  policy) # policy beside the reference plugin that REF_CNI names, ptp or bridge
    BENCH_CNI_BIN_DIR=$BENCH_DIR/bin/cni REFERENCE_HOOK=$bench/hook-reference REF_CNI=${REF_CNI:-bridge}
    BENCH_CNI_AGENT='$(sed -n s/^ExecStart=//p /etc/systemd/system/nftcni-agent.service)'
    export REF_CNI REFERENCE_HOOK
    ;;
  daemonset)
    scripts/image "$work/nftcni.tar" ghcr.io/nftcni/nftcni:dev
    BENCH_IMAGES=$work/nftcni.tar BENCH_NO_WAIT=1
    ;;
  esac
  "$bench/up" "$nodes" 2>&1 | sed 's/^/  /'
  if [ "$form" = daemonset ]; then
    k apply -f deploy/nftcni.yaml >/dev/null
    # Pods of the network itself find the API server without a Service.
    k -n kube-system rollout status ds/nftcni --timeout=120s
    k wait --for=condition=Ready node --all --timeout=120s
    k -n kube-system rollout status deploy/coredns --timeout=120s
  fi
}

bench_down() {
  local d
  if [ "${KEEP:-0}" = 1 ]; then
    echo "kept: $bench/kubectl, $bench/x NODE COMMAND, and $bench/down to end it; logs in $BENCH_DIR/state/m/*/log" >&2
    return
  fi
  BENCH_KEEP_LOGS=${BENCH_KEEP_LOGS-} "$bench/down" >/dev/null 2>&1
  # A folder that goes takes what another bench has mounted on it along.
  pgrep -f machine-init >/dev/null || for d in "${bench_made[@]}"; do rmdir "$d" 2>/dev/null; done
  rm -rf "$work"
}

# bench_sound: each node still has folders of its own; whoever removes such a folder on this machine
# takes what is mounted on it along, in every node
bench_sound() {
  local n d
  for n in $(node_names); do
    for d in $private_dirs; do
      on "$n" mountpoint -q "$d" || { echo "$d of $n is no longer its own: somebody removed $d on this machine"; return 1; }
    done
  done
}

# built: the binary to test in $work; NFTCNI_BINARY is one that was built before
built() { if [ -n "${NFTCNI_BINARY:-}" ]; then cp "$NFTCNI_BINARY" "$work/nftcni"; else build "$work/nftcni"; fi; }

# upgrade: the binary of this tree on every node, and an agent of it
upgrade() {
  local n
  built
  for n in $(node_names); do
    on "$n" "$work/nftcni" install --kubeconfig /etc/nftcni/kubeconfig >/dev/null
    stop_agent "$n" TERM
    start_agent "$n"
    until on "$n" /opt/cni/bin/nftcni agent ready >/dev/null 2>&1; do sleep 0.2; done
  done
}
