#!/usr/bin/env bash
# Builds the image and runs every line of README.md on this machine: needs Docker with compose v2 and 15 GB of disk.
#     docker/test.sh [cpu|cuda]        # cuda: the image alone, on the CPU
# BUILD_ARGS goes to `docker build`, as in BUILD_ARGS="--build-arg TORCH_INDEX=https://mirror/whl/cpu --network host".
# SERVICES limits what compose starts, where an image cannot be pulled: SERVICES="head encoder transformer decoder".
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-cpu}
image=disagg-ray:$target
read -ra build_args <<<"${BUILD_ARGS:-}"
read -ra services <<<"${SERVICES:-}"
volume=disagg-ray-test-$$
project=disagg-ray-test-$$
folder=$(mktemp -d)
export RAY_AUTH_TOKEN GRAFANA_PASSWORD
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
GRAFANA_PASSWORD=$RAY_AUTH_TOKEN

compose() { docker compose -p "$project" -f docker/compose.yaml "$@"; }
cleanup() {
  local status=$?
  compose down --volumes --timeout 5 >/dev/null 2>&1 || true
  docker rm -f "$volume" >/dev/null 2>&1 || true
  docker volume rm -f "$volume" >/dev/null 2>&1 || true
  rm -rf "$folder"
  exit "$status"
}
trap cleanup EXIT
step() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

step "build $image"
DOCKER_BUILDKIT=1 docker build "${build_args[@]}" -f docker/Dockerfile --target "$target" -t "$image" .
docker history --format '{{.Size}}\t{{.CreatedBy}}' "$image" | cut -c1-120
docker image inspect --format 'size: {{.Size}} bytes, user: {{.Config.User}}' "$image"

# As it is meant to run: read-only but for /tmp and a volume, no capabilities, user 1000.
sandbox=(--read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges --shm-size 1g -e HOME=/tmp -v "$volume:/data")
docker volume create "$volume" >/dev/null

step "nothing in $image that it does not need"
docker run --rm "${sandbox[@]}" "$image" sh -c '
  test "$(id -u)" = 1000
  for tool in pip g++ make git curl '"$([[ $target == cpu ]] && echo gcc cc ld)"'; do ! command -v $tool || exit 1; done
  test ! -e /root/.cache
  test "$(find /opt/venv -maxdepth 5 -type d -name torch -path "*/site-packages/torch" | wc -l)" = 1
' || fail "the image holds more than it should, or runs as another user"

step "one video, in one process"
docker run --rm "${sandbox[@]}" --network none "$image" disagg-ray generate --config /opt/disagg_ray/conf/tiny_t2v.yaml \
  --local --prompt "a red circle moving left" --seed 7 --output /data/local.mp4
[[ $target == cuda ]] && exit

step "one video, on a Ray of its own"
docker run --rm "${sandbox[@]}" "$image" disagg-ray generate --config /opt/disagg_ray/conf/tiny_t2v.yaml \
  --prompt "a red circle moving left" --seed 7 --output /data/ray.mp4
docker run --rm "${sandbox[@]}" "$image" sh -c 'cmp /data/local.mp4 /data/ray.mp4' || fail "the two videos differ"

step "SIGTERM ends a batch with what runs; the second run makes the rest"
docker run --rm "${sandbox[@]}" "$image" sh -c '
  for i in $(seq 40); do echo "{\"id\": \"v$i\", \"prompt\": \"a green square $i\", \"seed\": $i}"; done > /data/requests.jsonl'
batch=(disagg-ray generate --config /opt/disagg_ray/conf/tiny_t2v.yaml --requests /data/requests.jsonl --output-dir /data/out)
finished() { docker run --rm "${sandbox[@]}" "$image" sh -c 'ls /data/out/*.mp4 2>/dev/null | wc -l'; }
docker run -d --init --name "$volume" "${sandbox[@]}" "$image" "${batch[@]}" >/dev/null
until (($(finished) >= 3)); do
  [[ $(docker inspect --format '{{.State.Running}}' "$volume") == true ]] || { docker logs "$volume"; fail "the batch ended"; }
done
docker stop --time 60 "$volume" >/dev/null
status=$(docker inspect --format '{{.State.ExitCode}}' "$volume")
docker rm "$volume" >/dev/null
made=$(finished)
printf 'exit status %s with %s of 40 videos\n' "$status" "$made"
((status != 137 && status != 0)) || fail "the batch did not end at SIGTERM within a minute, or finished before"
((made < 40)) || fail "the batch finished before SIGTERM"
docker run --rm "${sandbox[@]}" "$image" "${batch[@]}"
(($(finished) == 40)) || fail "videos are missing"

step "compose: a cluster of containers"
compose up -d --wait "${services[@]}" # until the health checks say yes
for node in $(compose ps -q head encoder transformer decoder); do
  docker inspect --format '{{.Config.User}} {{.HostConfig.CapDrop}} {{.State.Health.Status}}' "$node"
done | sort | uniq -c | grep -qx ' *4 1000 \[ALL\] healthy' || fail "a node is not healthy or may do more than it should"
submit=(exec -T head ray job submit -- disagg-ray generate --config /opt/disagg_ray/docker/tiny_t2v.yaml)
compose "${submit[@]}" --prompt "a red circle moving left" --seed 7 --output /data/circle.mp4
compose cp head:/data/circle.mp4 "$folder"
docker run --rm "${sandbox[@]}" "$image" cat /data/local.mp4 | cmp - "$folder/circle.mp4" ||
  fail "the cluster's video differs from one process's"

step "compose: a worker killed in mid-batch"
compose exec -T head sh -c 'for i in $(seq 20); do echo "{\"id\": \"v$i\", \"prompt\": \"a green square $i\", \"seed\": $i}"; done > /data/requests.jsonl'
compose "${submit[@]}" --requests /data/requests.jsonl --output-dir /data/out &
job=$!
until (($(compose exec -T head sh -c 'ls /data/out/*.mp4 2>/dev/null | wc -l') >= 3)); do
  kill -0 "$job" 2>/dev/null || fail "the batch ended before a worker was killed"
  sleep 1
done
compose kill transformer
compose up -d transformer
wait "$job" || fail "the batch did not end well"
(($(compose exec -T head sh -c 'ls /data/out/*.mp4 | wc -l') == 20)) || fail "videos are missing"

step "compose: one more transformer"
compose up -d --wait --scale transformer=2 "${services[@]}"
compose "${submit[@]}" stages.transformer.replicas=2 --prompt "a red circle moving left" --seed 7 --output /data/two.mp4
compose exec -T head cmp /data/circle.mp4 /data/two.mp4 || fail "the video of two transformers differs"

step "compose: Prometheus scrapes every node"
if [[ -z ${services[*]} || " ${services[*]} " == *" prometheus "* ]]; then
  for _ in $(seq 60); do
    up=$(compose exec -T head python3 -c '
import json, urllib.request
targets = json.load(urllib.request.urlopen("http://prometheus:9090/api/v1/targets"))["data"]["activeTargets"]
print(sum(target["health"] == "up" for target in targets))' 2>/dev/null || echo 0)
    ((up >= 5)) && break
    sleep 2
  done
  ((up >= 5)) || fail "Prometheus reaches $up of 5 nodes"
else
  echo "left out: SERVICES does not name prometheus"
fi

step "passed"
