"""Generate one video or many, on this machine or as a Ray job.

    python jobs/generate.py --config conf/tiny_t2v.yaml --prompt "a red circle moving left" --output circle.mp4
    ray job submit --working-dir . -- python jobs/generate.py --config conf/tiny_t2v.yaml \\
        --prompt "a red circle moving left" --output /data/circle.mp4
    ray job submit --working-dir . -- python jobs/generate.py --config conf/tiny_t2v.yaml \\
        --requests prompts.jsonl --output-dir /data/clips
"""

import sys

from disagg_ray.cli.command import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
