"""A cluster without workers: `generate` waits for nodes, which come, make its video and go again.

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(openssl rand -hex 32)
python tests/growing_once.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import ray
from growing import growing_cluster, num_nodes, wait_until

STAGES = ("encoder", "transformer", "decoder")
COMMAND = [sys.executable, "-m", "disagg_ray.cli", "generate", "--prompt", "a red circle moves left", "--seed", "7"]


def generate(address: str, output: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `disagg-ray generate`, each stage on a CPU of its own."""
    one_cpu = [f"stages.{stage}.num_cpus=1" for stage in STAGES]
    command = [*COMMAND, "--config", "conf/tiny_t2v.yaml", "--output", str(output), f"cluster.address={address}"]
    command += [*one_cpu, *overrides]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main() -> None:
    folder = Path(sys.argv[1])
    with growing_cluster(folder, head_cpus=0) as address:
        ray.init(address=address, logging_level="ERROR")
        assert num_nodes() == 1
        job = generate(address, folder / "circle.mp4")
        wait_until(lambda: num_nodes() == 3 or job.poll() is not None, "no nodes came")
        shown, _ = job.communicate(timeout=240)
        print(shown, flush=True)
        assert job.returncode == 0
        assert "waiting for" in shown or "Adding" in shown  # ours comes every ten seconds; the autoscaler's at once
        assert len(iio.imread(folder / "circle.mp4", plugin="FFMPEG")) == 17
        print("made on nodes that came")
        wait_until(lambda: num_nodes() == 1, "idle nodes stay")
        print("idle nodes went")
        job = generate(address, folder / "never.mp4", "stages.transformer.num_cpus=64", "cluster.start_timeout_s=30")
        shown, _ = job.communicate(timeout=240)
        print(shown, flush=True)
        assert job.returncode == 1
        assert "No available node types can fulfill resource request {'CPU': 64.0}" in shown
        assert "waiting for transformer-0" in shown.splitlines()[-1]
        ray.shutdown()
    print("said what can never be")


if __name__ == "__main__":
    main()
