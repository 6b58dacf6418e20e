#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with addresses of their own, joined by a cable and nothing else.
#
#   tests/netns.sh up NAME        # NAME-a has 10.77.0.1, NAME-b has 10.77.0.2; needs root and iproute2
#   tests/netns.sh down NAME
set -euo pipefail
action=$1 name=$2

case $action in
up)
    ip netns add "$name-a"
    ip netns add "$name-b"
    ip link add eth0 netns "$name-a" type veth peer name eth0 netns "$name-b"
    for end in a:1 b:2; do
        host=$name-${end%:*}
        ip -n "$host" address add "10.77.0.${end#*:}/24" dev eth0
        ip -n "$host" link set eth0 up
        ip -n "$host" link set lo up
    done
    ;;
down)
    for host in "$name-a" "$name-b"; do
        if ip netns list | grep -q "^$host\b"; then ip netns delete "$host"; fi # and its end of the cable with it
    done
    ;;
esac
