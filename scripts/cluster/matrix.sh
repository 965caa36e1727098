# Sourced by scripts/cluster-test: truth tables by real pods (testdata/cluster/README.md).

matrix_ports="tcp/80 tcp/81 udp/80 udp/81 icmp/0"
declare -A pod_ip

matrix_pods() {
  local ns p main node i=0 all
  mapfile -t all < <(k get nodes -o 'jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}')
  for ns in x y z; do
    echo "{apiVersion: v1, kind: Namespace, metadata: {name: policy-$ns, labels: {ns: \"$ns\"}}}"
    for p in a b c; do
      main=81 node=${all[i++ % ${#all[@]}]}
      [ $p != a ] || main=80
      cat <<K
---
apiVersion: v1
kind: Pod
metadata: {name: $p, namespace: policy-$ns, labels: {pod: $p}}
spec:
  nodeName: $node
  terminationGracePeriodSeconds: 0
  containers:
    - {name: p80, image: $image, args: [netexec, --http-port=80, --udp-port=80], ports: [{containerPort: 80, name: serve-80-tcp, protocol: TCP}, {containerPort: 80, name: serve-80-udp, protocol: UDP}, {containerPort: $main, name: main, protocol: TCP}]}
    - {name: p81, image: $image, args: [netexec, --http-port=81, --udp-port=81], ports: [{containerPort: 81, name: serve-81-tcp, protocol: TCP}, {containerPort: 81, name: serve-81-udp, protocol: UDP}]}
K
    done
    echo ---
  done | k apply -f - 2> >(grep -v "duplicate port definition" >&2) >/dev/null
  for ns in x y z; do
    k -n policy-$ns wait --for=condition=Ready pod --all --timeout=120s >/dev/null
    while read -r p ips; do pod_ip[$ns/$p]=$ips; done < <(k -n policy-$ns get pods -o 'jsonpath={range .items[*]}{.metadata.name}{range .status.podIPs[*]} {.ip}{end}{"\n"}{end}')
  done
}

# targets: every address and port, one "POD ADDRESS PORT" a line
matrix_targets() {
  local pod ip port
  for pod in "${!pod_ip[@]}"; do
    for ip in ${pod_ip[$pod]}; do
      for port in $matrix_ports; do echo "$pod $ip $port"; done
    done
  done
}

# matrix_seen: "FROM TO ADDRESS PORT allow|deny" for every pair, sorted. One shell in each
# pod asks all its questions at once.
matrix_seen() {
  local pod out pids=()
  out=$(mktemp -d)
  for pod in "${!pod_ip[@]}"; do
    { cat "$probe"; matrix_targets; } | k -n "policy-${pod%/*}" exec -i "${pod#*/}" -c p80 -- bash -s 2>/dev/null | sed "s|^|$pod |" >"$out/${pod/\//-}" &
    pids+=($!)
  done
  wait "${pids[@]}" || true # who could not ask has no line, and that is a difference
  sort "$out"/*
  rm -rf "$out"
}

# matrix_expected CASE: the same form, from the case's expect lines
matrix_expected() {
  {
    sed -n 's/^# expect //p' "$1"
    echo --
    local pod
    for pod in "${!pod_ip[@]}"; do matrix_targets | sed "s|^|$pod |"; done
  } | awk '
    function fits(glob, s) { if (glob == "*") return 1; gsub(/\*/, "[^ ]*", glob); return s ~ "^" glob "$" }
    $1 == "--" { reading = 1; next }
    !reading { n++; verdict[n] = $1; from[n] = $2; to[n] = $3; port[n] = $4; next }
    { v = "allow"
      for (i = 1; i <= n; i++) if (fits(from[i], $1) && fits(to[i], $2) && fits(port[i], $4)) v = verdict[i]
      if ($1 == $2) v = "allow"
      print $0, v }' | sort
}

# matrix_policy CASE: its objects, with addresses for the placeholders
matrix_policy() {
  local line pod ip
  while IFS= read -r line; do
    if [[ $line =~ @(HOST|ALL):([^@]+)@ ]]; then
      pod=${BASH_REMATCH[2]}
      for ip in ${pod_ip[$pod]}; do
        case $ip in
        *:*) sed "s|@HOST:[^@]*@|$ip/128|g; s|@ALL:[^@]*@|::/0|g" <<<"$line" ;;
        *) sed "s|@HOST:[^@]*@|$ip/32|g; s|@ALL:[^@]*@|0.0.0.0/0|g" <<<"$line" ;;
        esac
      done
    else
      echo "$line"
    fi
  done <"$1"
}

# matrix_is CASE: what is seen is what is expected, at the first, second or third look
matrix_is() {
  local want=$work/want seen=$work/seen try
  matrix_expected "$1" >"$want"
  for try in 1 2 3; do
    matrix_seen >"$seen"
    if cmp -s "$want" "$seen"; then return 0; fi
  done
  diff "$want" "$seen" | sed 's/^</  expected/; s/^>/  seen    /' | grep '^  ' | head -20
  return 1
}

# matrix_change CASE BEFORE: applies it while every pod asks. What both policies agree on never shows
# anything else; the rest may be either. A question that was lost to a busy machine is asked again,
# with the change made once more; what got through that neither allows is not. Objects of one name
# replace each other in one step.
matrix_change() {
  local try asking
  if [ "$(cat "$1" "$2" | grep -c '^metadata:')" -gt 2 ]; then # several objects do not change at once
    matrix_apply "$1" "$2"
    return
  fi
  for try in 1 2 3; do
    matrix_seen >"$work/during" &
    asking=$!
    sleep 0.4
    matrix_apply "$1" "$2"
    wait $asking
    matrix_expected "$2" >"$work/was"
    matrix_expected "$1" >"$work/want"
    awk '{k = $1 " " $2 " " $3 " " $4}
      FILENAME == ARGV[1] {was[k] = $5; next}
      FILENAME == ARGV[2] {if (was[k] == $5) fixed[k] = $5; next}
      (k in fixed) && fixed[k] != $5 {print "  during   " $0}' "$work/was" "$work/want" "$work/during" >"$work/wrong"
    [ -s "$work/wrong" ] || return 0
    if grep -q ' allow$' "$work/wrong" || [ $try = 3 ]; then break; fi
    matrix_apply "$2" "$1"
    sleep 1
  done
  head -20 "$work/wrong"
  return 1
}

# matrix_apply CASE BEFORE: the objects of the case, and away with those that only the one before has. They
# are replaced, not applied: apply keeps the policyTypes that the API server filled in for the case before.
matrix_apply() {
  local name
  if [ -s "$1" ]; then
    matrix_policy "$1" >"$work/case.yaml"
    k replace -f "$work/case.yaml" >/dev/null 2>&1 || # who is not there yet
      k create -f "$work/case.yaml" 2>&1 >/dev/null | grep -v AlreadyExists >&2 || true
  fi
  for name in $(k get -n policy-x netpol -o 'jsonpath={.items[*].metadata.name}'); do
    grep -q "^metadata: {name: $name," "$1" || k -n policy-x delete --wait=false netpol "$name" >/dev/null
  done
}

check_matrix() {
  local case before=/dev/null name
  probe=$work/probe
  cat >"$probe" <<'P'
h() { case $2 in
  tcp/*) nc -z -w 2 "$1" "${2#*/}" ;;
  udp/*) [ -n "$(echo hostname | nc -u -w 1 "$1" "${2#*/}")" ] ;;
  icmp/*) ping -c 1 -W 2 "$1" ;;
esac >/dev/null 2>&1 && echo "$3 $1 $2 allow" || echo "$3 $1 $2 deny"; }
while read -r pod ip port; do h "$ip" "$port" "$pod" & done; wait
P
  matrix_pods
  check "truth table: no policy" matrix_is $before
  for case in testdata/cluster/*.yaml /dev/null; do
    name=$(basename "$case" .yaml)
    [[ $case == /dev/null || $name =~ $only ]] || continue
    [ "$case" != /dev/null ] || name="no policy left"
    check "truth table: while it becomes $name" matrix_change "$case" "$before"
    check "truth table: $name" matrix_is "$case"
    before=$case
  done
  for case in x y z; do drop_namespace policy-$case; done
}
