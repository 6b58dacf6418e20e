#!/usr/bin/env bash
# Submits one video to a running cluster and follows its log; the exit status is the job's.
#     RAY_ADDRESS=http://127.0.0.1:8265 jobs/submit.sh conf/tiny_t2v.yaml "a red circle moving left" /data/circle.mp4
# The output is an absolute path that the cluster's head sees, or a URL such as s3://bucket/circle.mp4.
# What follows the third argument goes on to `disagg-ray generate`: --seed 7, stages.transformer.replicas=2, ...
# The package's sources stay behind: the nodes' own are used.
set -euo pipefail
cd "$(dirname "$0")/.."
config=$1 prompt=$2 output=$3
version=$(sed -n 's/^VERSION = "\(.*\)"/\1/p' disagg_ray/version.py)
exec ray job submit --working-dir . --metadata-json "{\"disagg_ray\": \"$version\", \"config\": \"$config\"}" \
  --runtime-env-json '{"excludes": [".venv", ".git", "outputs", "/disagg_ray"]}' \
  -- disagg-ray generate --config "$config" --prompt "$prompt" --output "$output" "${@:4}"
