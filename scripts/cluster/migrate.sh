# Sourced by scripts/cluster-test: a node that changes from another plugin to nftcni.

# Pods of the bridge plugin run; then nftcni is installed, and takes the new ones.
check_migrate() {
  local ns=migrate n pod said ip
  new_namespace $ns
  for n in $(node_names); do plain_pod $ns "old-$n" "$n"; done
  k -n $ns wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  for n in $(node_names); do
    said=$(on "$n" "$NFTCNI" install --kubeconfig /etc/nftcni/kubeconfig)
    check "install on $n says what it moved aside" grep -q 'moved aside *10-ref.conflist\|moved aside.*10-ref.conflist' <<<"$said"
    check "install on $n says what is left" grep -q 'left alone .*cni0' <<<"$said"
    start_agent "$n"
  done
  check "agents serve" within 30 agents_ready
  for n in $(node_names); do plain_pod $ns "new-$n" "$n"; done
  check "new pods start" k -n $ns wait --for=condition=Ready pod --all --timeout=60s
  for n in $(node_names); do
    check "new pod on $n is nftcni's" attached "$n" $ns "new-$n"
    check "old pod on $n is not" not attached "$n" $ns "old-$n"
  done
  check "no address twice" test "$(k -n $ns get pods -o 'jsonpath={range .items[*]}{.status.podIP}{"\n"}{end}' | sort | uniq -d)" = ""
  for pod in $(k -n $ns get pods -o name); do
    for n in $(k -n $ns get pods -o name); do
      ip=$(k -n $ns get "$n" -o 'jsonpath={.status.podIP}')
      check "${pod#pod/} -> ${n#pod/}" ask $ns "${pod#pod/}" "http://$(h "$ip"):80/hostname"
    done
  done
  deny_all $ns
  check "policy holds for new pods" gone_within 5 ask $ns "old-$(first_node)" "http://$(h "$(k -n $ns get pod "new-$(first_node)" -o 'jsonpath={.status.podIP}')"):80/hostname"
  drop_namespace $ns
  n=$(first_node)
  stop_agent "$n" TERM
  check "uninstall on $n" on "$n" "$NFTCNI" uninstall
  check "uninstall on $n put the old configuration back" on "$n" test -e /etc/cni/net.d/10-ref.conflist
  check "uninstall on $n left nothing" on "$n" "$NFTCNI" uninstall --check
}

plain_pod() { k -n "$1" apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: $2}, spec: {nodeName: $3, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80]}]}}"; }
attached() { nftcni_on "$1" debug ipam -o json | jq -e --arg pod "$2/$3" 'any(.[]; .pod == $pod)'; }
