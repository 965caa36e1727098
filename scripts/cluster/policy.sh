# Sourced by scripts/cluster-test: what policy means for probes, Services, the host network,
# Jobs whose address comes back, and what the agents' rights are. Truth tables: matrix.sh.

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
  check "hairpin through a Service under deny-all" within 5 ask $ns p "http://$(h "$(cluster_ip $ns p)")/hostname"
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

cluster_ip() { k -n "$1" get svc "$2" -o 'jsonpath={.spec.clusterIP}'; }
node_port() { k -n "$1" get svc "$2" -o 'jsonpath={.spec.ports[0].nodePort}'; }
node_address() { k get node "$1" -o 'jsonpath={.status.addresses[?(@.type=="InternalIP")].address}' | cut -d' ' -f1; }
# block ADDRESS: an ipBlock of it alone
block() { case $1 in *:*) echo "{ipBlock: {cidr: \"$1/128\"}}" ;; *) echo "{ipBlock: {cidr: $1/32}}" ;; esac }
# without_port ADDRESS:PORT
without_port() { sed 's/:[0-9]*$//; s/[][]//g'; }
# let_in NAMESPACE NAME PEERS: a policy that lets them reach the pods "server"
let_in() { k -n "$1" apply -f - >/dev/null <<<"{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: $2}, spec: {podSelector: {matchLabels: {app: server}}, ingress: [{from: [$3], ports: [{port: web}]}]}}"; }

# Services under policy: ClusterIP to another port number, NodePorts with both traffic
# policies, a client outside judged by its real address, and pods in the host network.
check_services() {
  local ns=services svc first last
  first=$(first_node) last=$(last_node)
  new_namespace $ns
  k -n $ns apply -f - >/dev/null <<K
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  nodeName: $last
  terminationGracePeriodSeconds: 0
  containers: [{name: c, image: $image, args: [netexec, --http-port=8080], ports: [{name: web, containerPort: 8080}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: friend, labels: {app: friend}}
spec: {nodeName: $first, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, labels: {app: stranger}}
spec: {nodeName: $first, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host, labels: {app: friend}}
spec: {nodeName: $first, hostNetwork: true, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [netexec, --http-port=8099, --udp-port=8099]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: host-of-server, labels: {app: stranger}}
spec: {nodeName: $last, hostNetwork: true, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, args: [pause]}]}
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
  svc=http://$(h "$(cluster_ip $ns cluster)")/clientip
  check "Service: before any policy" within 5 ask $ns stranger "$svc"
  check "no SNAT between pods" test "$(ask $ns friend "$svc" | without_port)" = "$(pod_address $ns friend)"
  let_in $ns friends "{podSelector: {matchLabels: {app: friend}}}"
  check "Service: stranger denied" gone_within 5 ask $ns stranger "$svc"
  check "Service: friend allowed, named port" ask $ns friend "$svc"
  check_host_network
  check_node_ports
  drop_namespace $ns
}

# Pods in the host network are their node: no podSelector fits them, the pods of their own
# node they always reach.
check_host_network() {
  local server
  server=http://$(h "$(pod_address $ns server)"):8080/clientip
  check "hostNetwork: a label does not let it in" not ask $ns host "$server"
  check "hostNetwork: the server's own node gets in" ask $ns host-of-server "$server"
  let_in $ns node "$(block "$(node_address "$first")")"
  check "hostNetwork: its node's address does" within 5 ask $ns host "$server"
  k -n $ns delete netpol node >/dev/null
  check "hostNetwork: denied again" gone_within 5 ask $ns host "$server"
  check "hostNetwork: pods reach it" ask $ns stranger "http://$(h "$(node_address "$first")"):8099/hostname"
}

# The client outside keeps its address with externalTrafficPolicy Local, and with Cluster on the server's
# own node; another node's kube-proxy hides it behind that node.
check_node_ports() {
  local local_port port seen
  port=$(node_port $ns cluster) local_port=http://$(h "$(node_address "$last")"):$(node_port $ns local)/clientip
  check "NodePort Local: outside client denied" gone_within 5 outside "$local_port"
  let_in $ns outside '{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}'
  if ! seen=$(within 5 outside "$local_port"); then
    k -n $ns delete netpol outside >/dev/null
    if [ -n "$bench" ]; then check "NodePort Local: outside client with everything allowed" false; else not_run "NodePorts" "this machine does not reach $local_port"; fi
    return
  fi
  seen=$(without_port <<<"$seen")
  let_in $ns outside "$(block "$seen")"
  check "NodePort Local: allowed by its own address, $seen" within 5 outside "$local_port"
  check "NodePort Cluster, through the pod's node" outside "http://$(h "$(node_address "$last")"):$port/clientip"
  if [ "$first" != "$last" ]; then
    check "NodePort Cluster, through another node: denied, it hides the client" gone_within 5 outside "http://$(h "$(node_address "$first")"):$port/clientip"
    let_in $ns node "$(block "$(node_address "$first")")"
    check "NodePort Cluster, through another node: allowed by that node's address" within 5 outside "http://$(h "$(node_address "$first")"):$port/clientip"
  fi
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
  check "Job: 12 pods finish" k -n $ns wait --for=condition=Complete job/j --timeout=180s
  k -n $ns rollout status sts/s --timeout=120s >/dev/null
  k -n $ns rollout restart sts/s >/dev/null
  check "StatefulSet: rolling restart" k -n $ns rollout status sts/s --timeout=120s
  check "StatefulSet: member reaches member" within 5 ask $ns s-0 "http://$(h "$(pod_address $ns s-1)")/hostname"
  check "StatefulSet: stranger denied" not ask $ns stranger "http://$(h "$(pod_address $ns s-1)")/hostname"
  drop_namespace $ns
}

# Jobs of two kinds on one node, more pods than it has addresses: each friend is let in, no stranger
# is, whoever had its address before. backoffLimit 0: one wrong answer fails its Job.
check_reuse() {
  local ns=reuse count=${REUSE_PODS:-140} kind said node again
  node=$(last_node)
  new_namespace $ns
  traffic_pods $ns
  for kind in friend stranger; do
    said="for i in 1 2 3 4 5 6; do nc -z -w 1 $server 80 && exit 0; done; exit 1"
    [ $kind = friend ] || said="! nc -z -w 1 $server 80"
    k -n $ns apply -f - >/dev/null <<K
apiVersion: batch/v1
kind: Job
metadata: {name: $kind}
spec:
  completions: $count
  parallelism: 12
  backoffLimit: 0
  template:
    metadata: {labels: {app: $kind}}
    spec: {nodeName: $node, restartPolicy: Never, terminationGracePeriodSeconds: 0, containers: [{name: c, image: $image, command: [bash, -c, "$said"]}]}
K
  done
  for kind in friend stranger; do
    check "reuse: $count pods of Job $kind" k -n $ns wait --for=condition=Complete job/$kind --timeout=400s
  done
  k -n $ns get pods -l 'app in (friend,stranger)' -o 'jsonpath={range .items[*]}{.status.podIP} {.metadata.labels.app}{"\n"}{end}' >"$work/reuse"
  again=$(cut -d' ' -f1 "$work/reuse" | sort | uniq -d | wc -l)
  if [ "$again" -gt 0 ]; then
    echo "     $again addresses came back, $(sort -u "$work/reuse" | cut -d' ' -f1 | uniq -d | wc -l) of them to the other Job"
  else
    not_run "reuse: an address that comes back" "$node has more addresses than $count and $count pods use up"
  fi
  drop_namespace $ns
}

# One agent's token, as if its node had been taken over, against the admission policy.
check_rights() {
  local ns=rights node token other all n
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
