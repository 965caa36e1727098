# Sourced by scripts/cluster-test: what has to hold in a cluster besides the truth tables.

# ask NAMESPACE POD URL: an HTTP answer in time
ask() { k -n "$1" exec "$2" -- curl -sf -m 3 "$3"; }
not() { ! "$@"; }
h() { case $1 in *:*) echo "[$1]" ;; *) echo "$1" ;; esac; }
# nftcni_on NODE ARGS...: the command line on a node
nftcni_on() {
  local node=$1 pod
  shift
  if [ -n "${bench:-}" ]; then on "$node" /opt/cni/bin/nftcni "$@"; return; fi
  pod=$(k -n kube-system get pods -l app.kubernetes.io/name=nftcni --field-selector "spec.nodeName=$node" -o 'jsonpath={.items[0].metadata.name}')
  k -n kube-system exec "$pod" -c agent -- /nftcni "$@"
}
node_names() { k get nodes -o 'jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}'; }
first_node() { node_names | head -1; }
new_namespace() { k create ns "$1" --dry-run=client -o yaml | k apply -f - >/dev/null; }
drop_namespace() { k delete ns "$1" --wait=true --timeout=120s >/dev/null; }
deny_all() { k -n "$1" apply -f - <<<'{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: deny}, spec: {podSelector: {}, policyTypes: [Ingress, Egress]}}' >/dev/null; }

# Kubelet probes of all kinds go on under a policy that denies everything.
check_probes() {
  local ns=probes
  new_namespace $ns
  deny_all $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: p, labels: {app: p}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - {name: http, image: $image, args: [netexec, --http-port=80], readinessProbe: {httpGet: {path: /healthz, port: 80}, periodSeconds: 1}, livenessProbe: {httpGet: {path: /healthz, port: 80}, periodSeconds: 1, failureThreshold: 2}}
    - {name: tcp, image: $image, args: [netexec, --http-port=81, --udp-port=-1], readinessProbe: {tcpSocket: {port: 81}, periodSeconds: 1}, livenessProbe: {tcpSocket: {port: 81}, periodSeconds: 1, failureThreshold: 2}}
    - {name: exec, image: $image, args: [pause], readinessProbe: {exec: {command: ["true"]}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: p}
spec: {selector: {app: p}, ports: [{port: 80}]}
K
  check "probes: ready under deny-all" k -n $ns wait --for=condition=Ready pod/p --timeout=60s
  sleep 6
  check "probes: no restart" test "$(k -n $ns get pod p -o 'jsonpath={.status.containerStatuses[*].restartCount}')" = "0 0 0"
  check "hairpin through a Service under deny-all" ask $ns p "http://$(h "$(k -n $ns get svc p -o 'jsonpath={.spec.clusterIP}')")/hostname"
  check "an isolated pod does not reach DNS" not k -n $ns exec p -c http -- dig +time=1 +tries=1 kubernetes.default.svc.cluster.local
  k -n $ns apply -f - >/dev/null <<'K'
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: dns}
spec:
  podSelector: {}
  policyTypes: [Egress]
  egress:
    - to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
      ports: [{port: 53, protocol: UDP}, {port: 53, protocol: TCP}]
K
  check "DNS through its Service, by policy" k -n $ns exec p -c http -- dig +time=2 +tries=2 +short kubernetes.default.svc.cluster.local
  drop_namespace $ns
}

# Services under policy: ClusterIP to another port number, NodePorts with both traffic
# policies, a client outside judged by its real address, and pods in the host network.
check_services() {
  local ns=services node np port outside client nodes_ips
  new_namespace $ns
  mapfile -t nodes_ips < <(k get nodes -o 'jsonpath={range .items[*]}{.status.addresses[0].address}{"\n"}{end}')
  k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  nodeName: $(node_names | tail -1)
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: $image, args: [netexec, --http-port=8080], ports: [{name: web, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {app: stranger}}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host, labels: {app: friend}}
spec: {nodeName: $(first_node), hostNetwork: true, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Service
metadata: {name: cluster}
spec: {type: NodePort, selector: {app: server}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: server}, ports: [{port: 80, targetPort: web}]}
K
  k -n $ns wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  local svc
  svc=http://$(h "$(k -n $ns get svc cluster -o 'jsonpath={.spec.clusterIP}')")/clientip
  check "Service: before any policy" ask $ns stranger "$svc"
  check "no SNAT between pods" test "$(ask $ns friend "$svc" | sed 's/:[0-9]*$//; s/[][]//g')" = "$(k -n $ns get pod friend -o 'jsonpath={.status.podIP}')"
  k -n $ns apply -f - >/dev/null <<'K'
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}], ports: [{port: web}]}]
K
  check "Service: stranger denied" gone_within 5 ask $ns stranger "$svc"
  check "Service: friend allowed, named port" ask $ns friend "$svc"
  if [ -n "${bench:-}" ]; then
    port=$(k -n $ns get svc local -o 'jsonpath={.spec.ports[0].nodePort}')
    np=$(k -n $ns get svc cluster -o 'jsonpath={.spec.ports[0].nodePort}')
    client=http://$(h "${nodes_ips[-1]}"):$port/clientip
    check "NodePort Local: outside client denied" not outside "$client"
    outside=$(outside_addresses)
    k -n $ns apply -f - >/dev/null <<K
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: outside}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [$outside]}]
K
    check "NodePort Local: allowed by its own address" outside "$client"
    check "NodePort Cluster, through the pod's node" outside "http://$(h "${nodes_ips[-1]}"):$np/clientip"
  fi
  drop_namespace $ns
}

outside() { nsenter --net=/run/netns/kb-fabric curl -sf -m 3 "$1"; }
outside_addresses() {
  nsenter --net=/run/netns/kb-fabric ip -j addr show dev br0 |
    jq -r '[.[].addr_info[] | select(.scope == "global") | "{ipBlock: {cidr: \"\(.local)/\(if .family == "inet" then 32 else 128 end)\"}}"] | join(", ")'
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

# One agent's token, as if its node had been taken over, against the admission policy.
check_rights() {
  local ns=rights node token other
  mapfile -t all < <(node_names)
  node=${all[0]} other=${all[-1]}
  token=$(k -n kube-system create token nftcni --bound-object-kind Node --bound-object-name "$node" --duration 10m)
  new_namespace $ns
  for n in "$node" "$other"; do
    k -n $ns apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: on-$n, annotations: {keep: me}, labels: {app: x}}, spec: {nodeName: $n, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}}"
  done
  as_agent() { k --kubeconfig "$work/agent.kubeconfig" "$@"; }
  k config view --raw --minify --flatten | sed '/^users:/,$d' >"$work/agent.kubeconfig"
  printf 'users: [{name: agent, user: {token: %s}}]\n' "$token" >>"$work/agent.kubeconfig"
  sed -i "s/^    user: .*/    user: agent/" "$work/agent.kubeconfig"
  check "rights: own annotation on own node" as_agent -n $ns annotate --overwrite pod "on-$node" nftcni.io/addresses=10.0.0.1
  check "rights: pod of another node refused" not as_agent -n $ns annotate --overwrite pod "on-$other" nftcni.io/addresses=10.0.0.1
  check "rights: another annotation refused" not as_agent -n $ns annotate --overwrite pod "on-$node" keep=you
  check "rights: removing an annotation refused" not as_agent -n $ns annotate pod "on-$node" keep-
  check "rights: label refused" not as_agent -n $ns label --overwrite pod "on-$node" app=y
  check "rights: delete refused" not as_agent -n $ns delete pod "on-$node" --wait=false
  check "rights: status refused" not as_agent -n $ns patch pod "on-$node" --subresource=status -p '{"status":{"podIP":"10.0.0.1"}}'
  check "rights: key of the own Node" as_agent annotate --overwrite node "$node" nftcni.io/wireguard-keys=0:AAAA
  check "rights: key of another Node refused" not as_agent annotate --overwrite node "$other" nftcni.io/wireguard-keys=0:AAAA
  check "rights: label of the own Node refused" not as_agent label --overwrite node "$node" trusted=yes
  k annotate node "$node" nftcni.io/wireguard-keys- >/dev/null
  agent_token() { as_agent -n kube-system create token nftcni "$@" >/dev/null; }
  check "rights: the next token for the own node" agent_token --bound-object-kind Node --bound-object-name "$node"
  check "rights: token for another node refused" not agent_token --bound-object-kind Node --bound-object-name "$other"
  check "rights: token bound to nothing refused" not agent_token
  check "rights: secrets refused" not as_agent get secrets -A
  k -n $ns annotate pod "on-$node" nftcni.io/addresses- >/dev/null
  drop_namespace $ns
}

# Jobs that finish, and a rolling restart, under policy.
check_jobs() {
  local ns=jobs
  new_namespace $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: batch/v1
kind: Job
metadata: {name: j}
spec:
  completions: 12
  parallelism: 4
  template: {spec: {restartPolicy: Never, containers: [{name: c, image: $image, command: [sh, -c, "exit 0"]}]}}
---
apiVersion: v1
kind: Service
metadata: {name: s}
spec: {clusterIP: None, selector: {app: s}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: s}
spec:
  serviceName: s
  replicas: 3
  selector: {matchLabels: {app: s}}
  template:
    metadata: {labels: {app: s}}
    spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80], readinessProbe: {httpGet: {port: 80}, periodSeconds: 1}}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: s}
spec:
  podSelector: {matchLabels: {app: s}}
  ingress: [{from: [{podSelector: {matchLabels: {app: s}}}], ports: [{port: 80}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec: {terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
K
  check "Job: 12 pods finish" k -n $ns wait --for=condition=Complete job/j --timeout=120s
  k -n $ns rollout status sts/s --timeout=120s >/dev/null
  k -n $ns rollout restart sts/s >/dev/null
  check "StatefulSet: rolling restart" k -n $ns rollout status sts/s --timeout=120s
  check "StatefulSet: member reaches member" ask $ns s-0 "http://$(h "$(k -n $ns get pod s-1 -o 'jsonpath={.status.podIP}')")/hostname"
  check "StatefulSet: stranger denied" not ask $ns stranger "http://$(h "$(k -n $ns get pod s-1 -o 'jsonpath={.status.podIP}')")/hostname"
  drop_namespace $ns
}

# residue NODE: what a node holds per pod, as numbers that must come back
residue() {
  echo "attached $(nftcni_on "$1" debug pods -o json | jq '[.. | objects | select(has("hostInterface"))] | length')"
  echo "leases $(nftcni_on "$1" debug ipam -o json | jq '[.. | objects | select(has("address"))] | length')"
  [ -n "${bench:-}" ] || return 0
  echo "links $(on "$1" ip -j link | jq '[.[] | select(.ifname | test("^nft[0-9a-f]{12}$"))] | length')"
  echo "elements $(on "$1" nft -j list table inet nftcni | jq '[.nftables[] | (.set // .map) | select(. != null) | select(.name | test("^(local|bound|self|masquerade|isolated)")) | (.elem // []) | length] | add')"
  echo "routes $(on "$1" sh -c 'ip route show proto 157; ip -6 route show proto 157' | grep -c 'dev nft[0-9a-f]\{12\}')"
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
    k -n $ns apply -f - >/dev/null <<K
apiVersion: apps/v1
kind: Deployment
metadata: {name: many}
spec:
  replicas: $count
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec: {nodeSelector: {kubernetes.io/hostname: $node}, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
K
    check "$count pods on $node, round $round" k -n $ns rollout status deploy/many --timeout=300s
    echo "     $((SECONDS - began)) s"
    k -n $ns delete deploy many >/dev/null
    k -n $ns wait --for=delete pod -l app=many --timeout=300s >/dev/null
  done
  check "nothing leaked on $node" same_residue "$node"
  drop_namespace $ns
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

# traffic_pods NAMESPACE: a server, a friend on another node that policy lets in, a stranger
traffic_pods() {
  k -n "$1" apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {nodeName: $(node_names | tail -1), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger}
spec: {nodeName: $(first_node), terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
K
  k -n "$1" wait --for=condition=Ready pod --all --timeout=60s >/dev/null
  server=$(k -n "$1" get pod server -o 'jsonpath={.status.podIP}')
  check "$1: stranger denied before" gone_within 5 k -n "$1" exec stranger -- nc -z -w 1 "$server" 80
}

# under_traffic NAMESPACE COMMAND: packets of one flow, and one new connection after
# another, of both clients, while the command runs five times. Nothing that is allowed may be lost,
# nothing that is denied may pass. The clients do not depend on the exec that started them.
under_traffic() {
  local ns=$1 i sent got
  shift
  detached "$ns" friend ping "ping -q -i 0.01 -c 1500 $server"
  detached "$ns" stranger ping "ping -q -i 0.01 -c 1500 $server"
  detached "$ns" friend tcp "end=\$((SECONDS+15)); while [ \$SECONDS -lt \$end ]; do nc -z -w 2 $server 80 && echo yes || echo no; done"
  detached "$ns" stranger tcp "end=\$((SECONDS+15)); while [ \$SECONDS -lt \$end ]; do for i in 1 2 3 4 5; do (nc -z -w 1 $server 80 && echo yes || echo no) & done; wait; done"
  for i in 1 2 3 4 5; do
    sleep 2
    "$@"
  done
  for i in friend stranger; do
    for got in ping tcp; do
      within 60 k -n "$ns" exec $i -- cat /tmp/$got.done >"$work/$i.$got" || true
    done
  done
  check "$ns: no packet of a live allowed flow lost" says ', 0% packet loss' "$work/friend.ping"
  check "$ns: no packet of a denied flow passed" says ' 0 \(packets \)\?received' "$work/stranger.ping"
  got=$(grep -c yes "$work/friend.tcp") sent=$(grep -c . "$work/friend.tcp")
  check "$ns: $got of $sent allowed new connections" test "$got" = "$sent"
  got=$(grep -c yes "$work/stranger.tcp") sent=$(grep -c . "$work/stranger.tcp")
  check "$ns: $got of $sent denied new connections" test "$got" = 0
}

# detached NAMESPACE POD NAME SCRIPT: its output is in /tmp/NAME.done when it has ended
detached() { k -n "$1" exec "$2" -- bash -c "setsid bash -c '($4) >/tmp/$3 2>&1; mv /tmp/$3 /tmp/$3.done' </dev/null >/dev/null 2>&1 &"; }

# The agents of all nodes are killed again and again while pods talk.
check_kill() {
  new_namespace kill
  traffic_pods kill
  under_traffic kill kill_agents
  check "kill: agents serve again" within 200 agents_ready
  drop_namespace kill
}

# containerd and kubelet are killed while pods talk.
check_restart() {
  local n
  [ -n "${bench:-}" ] || { echo "     restart: needs the nodes of the bench"; return; }
  new_namespace restart
  traffic_pods restart
  under_traffic restart restart_runtimes
  for n in $(node_names); do
    check "restart: a new pod on $n" run_pod restart "after-$n" "$n"
  done
  drop_namespace restart
}

restart_runtimes() { local n; for n in $(node_names); do restart_daemon "$n" containerd; restart_daemon "$n" kubelet; done; }

# restart_daemon NODE NAME: kills it, and starts it again with the same arguments
restart_daemon() {
  on "$1" bash -c 'pid=$(pgrep -ox "$0") || exit 0
    mapfile -d "" args </proc/$pid/cmdline
    kill -9 $pid
    while [ -e /proc/$pid ]; do sleep 0.1; done
    exec </dev/null >>/etc/kubernetes/again.log 2>&1
    setsid --fork "${args[@]}"' "$2"
}

# run_pod NAMESPACE NAME NODE: a pod that gets ready
run_pod() {
  k -n "$1" apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: $2}, spec: {nodeName: $3, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=80]}]}}"
  k -n "$1" wait --for=condition=Ready "pod/$2" --timeout=90s
}

# Without the DaemonSet pods stay connected, policy stays in force, and new pods wait.
check_removed() {
  [ "$form" = daemonset ] || return 0
  new_namespace removed
  traffic_pods removed
  k -n kube-system delete ds nftcni --wait=true >/dev/null
  k -n kube-system wait --for=delete pod -l app.kubernetes.io/name=nftcni --timeout=60s >/dev/null
  under_traffic removed true
  check "removed: a new pod waits" not run_pod_soon removed new "$(first_node)"
  k apply -f deploy/nftcni.yaml >/dev/null
  check "removed: it starts when nftcni is back" k -n removed wait --for=condition=Ready pod/new --timeout=120s
  drop_namespace removed
}

run_pod_soon() {
  k -n "$1" apply -f - >/dev/null <<<"{apiVersion: v1, kind: Pod, metadata: {name: $2}, spec: {nodeName: $3, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}}"
  k -n "$1" wait --for=condition=Ready "pod/$2" --timeout=8s
}

# says PATTERN FILE: shows the file if it does not
says() { grep -q "$1" "$2" || { cat "$2"; return 1; }; }
agents_ready() { local n; for n in $(node_names); do nftcni_on "$n" agent ready || return 1; done; }

# kill_agents ends every agent with SIGKILL; systemd or the kubelet start it again, and in the
# bench's form "install", which has no systemd, this function does.
kill_agents() {
  local n
  for n in $(node_names); do
    if [ -z "${bench:-}" ]; then
      k -n kube-system delete pod -l app.kubernetes.io/name=nftcni --grace-period=0 --force >/dev/null 2>&1
      return
    fi
    stop_agent "$n" KILL
    [ "$form" != install ] || start_agent "$n"
  done
}

# stop_agent NODE SIGNAL: and wait until it is gone
stop_agent() {
  local pid
  pid=$(on "$1" pgrep -f 'nftcni agent --config' | head -1) || true
  [ -n "$pid" ] || return 0
  on "$1" kill "-$2" "$pid" 2>/dev/null || return 0
  gone_within 20 on "$1" kill -0 "$pid"
}

start_agent() {
  on "$1" setsid --fork bash -c 'exec </dev/null >>/etc/kubernetes/nftcni-agent.log 2>&1; exec $(sed -n s/^ExecStart=//p /etc/systemd/system/nftcni-agent.service)'
}
