"""The installed command as a user types it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import helpers
import imageio.v3 as iio
import numpy as np
import psutil
import pytest

from disagg_ray import Request, cli
from disagg_ray.cli.command import COMMANDS
from disagg_ray.config.docs import field_docs, to_markdown

T2V = "conf/tiny_t2v.yaml"
COMMAND = [sys.executable, "-m", "disagg_ray.cli"]
SMALL = ["--num-frames", "9", "--num-inference-steps", "4"]
SURE_S = 300.0
NO_CLUSTER = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def generate(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> tuple[int, str, str]:
    return run(
        capsys, "generate", "--config", T2V, "--output", str(output), "--prompt", "a red circle", *SMALL, *arguments
    )


BAD = [
    (["--prompt", ""], "invalid prompt='': must say what to show"),
    (["--prompt", "x" * 10_001], "must be at most limits.max_prompt_chars=10000 characters, not 10001"),
    (["--height", "50"], "invalid height=50: must be a positive multiple of 16; the nearest is 48"),
    (["--width", "-16"], "invalid width=-16: must be a positive multiple of 16; the nearest is 16"),
    (["--num-frames", "8"], "invalid num_frames=8: must be 4k + 1; the nearest is 9"),
    (["--num-inference-steps", "0"], "invalid num_inference_steps=0: must be at least 1"),
    (["--height", "512", "--width", "512"], "limits.max_pixels=65536"),
    (["--num-frames", "101"], "limits.max_frames=33"),
    (["--guidance-scale", "nan"], "invalid guidance_scale=nan"),
    (["--guidance-scale", "inf"], "invalid guidance_scale=inf"),
    (["--guidance-scale-2", "3"], "invalid guidance_scale_2=3.0: must be left out: this model has one transformer"),
    (["--seed", "-1"], "invalid seed=-1: must be from 0 to "),
    (["--seed", "many"], "argument --seed: 'many' is not one whole number"),
    (["--stg-block", "28,29"], "argument --stg-block: '28,29' is not one whole number"),
    (["--conditioning-scale", "1,2"], "argument --conditioning-scale: '1,2' is not one number"),
    (["--image", "README.md"], "image: given, but a model of task t2v takes none"),
    (["--imag", "README.md"], "unrecognized arguments: --imag; did you mean --image?"),
    (["--promt=x"], "unrecognized arguments: --promt=x; did you mean --prompt?"),
    (["--steps", "3"], "; did you mean --num-inference-steps?"),
    (["--colour", "red"], "; `disagg-ray generate --help` lists the flags"),
    (["red", "circle"], "override: 'red' is not KEY=VALUE, as stages.transformer.replicas=2; a text with spaces "),
    (["--reference-images", "a.png", "b.png"], "'b.png' is not KEY=VALUE, as stages.transformer.replicas=2; a text "),
    (["--reference-images", "a.png", "b.png"], ", and each of several images after a --reference-images of its own"),
    (["model.path=/no/such/folder"], "model.path: '/no/such/folder' is no folder on this node"),
    (["stages.transformer.replica=2"], "did you mean stages.transformer.replicas?"),
    (["stages.transformer.replicas=0"], "invalid stages.transformer.replicas=0: must be at least 1"),
    (["replicas"], "override: 'replicas' is not KEY=VALUE"),
    (["stages.encoder.blocks=[text_encodr]"], "no block 'text_encodr'; did you mean text_encoder?"),
    (["stages.encoder.blocks=[decode]"], "'prompt_embeds' has no producer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = generate(capsys, tmp_path / "out.mp4", "--local", *arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.mp4"
    output.write_bytes(b"mine")
    assert generate(capsys, output)[0] == 2
    assert output.read_bytes() == b"mine"


def test_missing_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "generate", "--config", "conf/none.yaml", "--output", "x.mp4", "--prompt", "x")
    assert (status, "conf/none.yaml" in err) == (2, True)


def test_a_config_of_the_package_is_named_where_the_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for config in ("tiny_t2v", T2V):
        status, _, err = run(capsys, "config", "--config", config)
        assert (status, "did you mean builtin:tiny_t2v, which comes with the package?" in err) == (2, True)


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = "disagg-ray: error: COMMAND: no command 'genrate'; did you mean generate?\n"
    assert run(capsys, "genrate") == (2, "", message)
    assert "`disagg-ray --help` lists the commands" in run(capsys, "--frobnicate")[2]


def test_a_home_is_expanded_where_the_shell_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(capsys, "keys", "add", "alice", "--file=~/keys.json")[0] == 0
    assert run(capsys, "make-checkpoint", "tiny-t2v", "~/tiny")[0] == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} >= {"keys.json", "tiny"}


def test_a_report_of_no_run_names_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "report", str(tmp_path / "none"))
    assert status == 2
    assert err.endswith("none' has no manifest.jsonl; give the --output-dir of a run\n")


def test_files_of_the_package_are_read_as_utf8_in_any_locale() -> None:
    ascii_only = NO_CLUSTER | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["--list"], ["--config", "builtin:tiny_t2v"]):
        done = subprocess.run([*COMMAND, "config", *arguments], check=False, env=ascii_only, capture_output=True,
                              text=True, timeout=300)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


def test_local_run_writes_a_video_that_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "out.mp4"
    status, out, _ = generate(capsys, output, "--local", "stages.encoder.num_threads=1", "--fps", "12")
    assert status == 0
    assert f"wrote {output}" in out
    assert iio.imread(output, plugin="FFMPEG").shape == (9, 256, 256, 3)
    assert iio.immeta(output, plugin="FFMPEG")["fps"] == 12


def test_suffix_decides_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("frames.npy", "frames", "frames.gif"):
        assert generate(capsys, tmp_path / name, "--local", "--seed", "7")[0] == 0
    frames = np.load(tmp_path / "frames.npy")
    images = np.stack([iio.imread(path) for path in sorted((tmp_path / "frames").iterdir())])
    assert (frames.shape, frames.dtype, images.shape) == ((9, 64, 64, 3), np.float32, (9, 64, 64, 3))
    assert np.array_equal((frames * 255).round().astype(np.uint8), images)


MANY = ["generate", "--config", T2V, "--requests", "requests.jsonl"]
REFUSED = [
    ([*MANY, "--output-dir", "out", "--prompt", "a cat"], "--prompt: given with --requests"),
    ([*MANY, "--output-dir", "out", "--num-frames", "9"], "--num-frames: given with --requests"),
    ([*MANY, "--output-dir", "out", "--output", "a.mp4"], "--output: given with --requests"),
    ([*MANY, "--output-dir", "out", "--local"], "--local: given with --requests"),
    ([*MANY, "--output-dir", "out", "--overwrite"], "--overwrite: given with --requests"),
    (MANY, "--output-dir: not given"),
    ([*MANY, "--output-dir", "s3://bucket/out"], "output-dir: 's3://bucket/out' is a URL"),
    ([*MANY, "--output-dir", "out"], "requests: 'requests.jsonl' cannot be read: No such file or directory"),
    (["generate", "--config", T2V, "--prompt", "a cat"], "--output: not given"),
    (["generate", "--config", T2V, "--output", "a.mp4", "--output-dir", "o"], "--output-dir: given without --requests"),
    (["generate", "--config", T2V, "--output", "a.mp4", "--verify"], "--verify: given without --requests"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_flags_of_one_video_and_of_many_exclude_each_other(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    config = Path(T2V).absolute()
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *(str(config) if argument == T2V else argument for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_bad_lines_are_status_2_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "a cat"}\n{"promt": "a dog"}\n{"prompt": "a cow", "id": "../x"}\n')
    many = ["--requests", str(requests), "--output-dir", str(tmp_path / "out")]
    status, _, err = run(capsys, "generate", "--config", T2V, *many)
    assert status == 2
    assert "2 lines of" in err
    assert [line.name for line in (tmp_path / "out").iterdir() if line.name == "invalid.jsonl"]


def test_config_prints_what_was_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "config", "stages.transformer.replicas=3", "--config", T2V)
    assert status == 0
    assert "replicas: 3" in out
    assert "path: builtin:tiny-wan-t2v" in out


def test_every_request_field_has_a_flag_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for field, meaning in field_docs(Request).items():
        if field != "format":
            assert f"--{field.replace('_', '-')}" in out
            assert meaning.split(";")[0][:40] in out


def test_unknown_command_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "generat")[0] == 2
    assert run(capsys)[0] == 0


def test_make_checkpoint_names_the_nearest_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "make-checkpoint", "tiny-t2w", str(tmp_path / "model"))
    assert status == 2
    assert "tiny-t2v" in err


@pytest.mark.parametrize(
    ("folder", "device", "says"),
    [("file", "cpu", "folder: 'file' is no folder; give the name of one"), ("new", "tpu", "invalid device='tpu': ")],
)
def test_make_checkpoint_names_what_cannot_be(
    folder: str, device: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    status, _, err = run(capsys, "make-checkpoint", "tiny-t2v", folder, "--device", device)
    assert (status, err.startswith(f"disagg-ray: error: {says}")) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["config", "--config", "none.yaml"],
        ["doctor", "--local", "--config", "none.yaml"],
        ["report", "nowhere"],
        ["report", "nowhere", "--output", "-"],
        ["plan", "--config", T2V, "--profile", "none.json", "--gpus", "1xH200"],
        ["plan", "--config", T2V, "--profile", "none.json", "--gpus", "1xH200", "--output", "/proc/plan.yaml"],
        ["profile", "--config", T2V, "--output", "/proc/profile.json"],
        ["profile", "--config", T2V, "--output", "conf"],
        ["up", "name", "--config", "none.yaml"],
        ["up", "name", "--config", T2V, "--here"],
        ["scale", "name", "transformer=none"],
        ["down"],
        ["ls", "name"],
        ["generate", "--config", T2V, "--prompt", "x", "--output", "-"],
        ["generate", "--config", T2V, "--prompt", "x", "--output", "/proc/nope/o.mp4"],
        ["generate", "--config", T2V, "--requests", "requests.jsonl", "--output-dir", "-"],
    ],
    ids=" ".join,
)
def test_every_command_refuses_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("disagg-ray: error: ")


def test_an_error_that_nobody_meant_is_one_line_that_names_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> int:
        raise RuntimeError("one\ntwo \x1b[31m")

    monkeypatch.setitem(COMMANDS, "ls", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, _, err = run(capsys, "ls")
    (trace,) = tmp_path.iterdir()
    assert status == 1
    assert err.startswith("disagg-ray: failed: RuntimeError: one; two \\x1b[31m; ")
    assert err.endswith(f"{trace}\n")
    assert "in broken" in trace.read_text()


def test_a_video_that_its_place_does_not_take_is_elsewhere(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, _, err = generate(capsys, small_disk / "out.npy", "--local")
    (rescued,) = tmp_path.glob("disagg_ray-rescued-*/video.npy")
    assert status == 1
    assert f"output: {str(small_disk / 'out.npy')!r} could not be written: [Errno 28] No space left" in err
    assert repr(str(rescued)) in err
    assert np.load(rescued).shape == (9, 64, 64, 3)
    assert list(small_disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| true", ">&- 2>&- <&-"])
def test_a_video_is_done_whoever_listens(redirection: str, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    command = " ".join(
        [*COMMAND, "generate", "--local", "--config", T2V, "--output", str(output), "--prompt", "x", *SMALL]
    )
    script = f"set -o pipefail; {command} --trace {tmp_path}/trace.json {redirection}"
    done = subprocess.run(["bash", "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert len(iio.imread(output, plugin="FFMPEG")) == 9
    assert (tmp_path / "trace.json").exists()


def test_a_listing_that_cannot_be_written_is_a_failure() -> None:
    command = [*COMMAND, "config", "--config", T2V]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "disagg-ray: failed: standard output cannot be written: No space left on device\n"


@pytest.mark.slow
def test_more_gpus_than_the_machine_has_are_refused(tmp_path: Path) -> None:
    arguments = ["generate", "--config", T2V, "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    arguments += ["stages.transformer.num_gpus=1", "stages.transformer.replicas=64"]
    done = subprocess.run(
        [*COMMAND, *arguments], check=False, env=NO_CLUSTER, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "the stages need 64 GPUs (encoder 1 x 0, transformer 64 x 1, decoder 1 x 0)" in done.stderr


@pytest.mark.slow
def test_a_machine_too_busy_to_start_ray_is_no_bug_of_ours(tmp_path: Path) -> None:
    """Ray gives its own processes seconds to start, and raises something or other after that; here it gives none."""
    command = [*COMMAND, "generate", "--config", T2V, "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    busy = NO_CLUSTER | {"RAY_gcs_server_port_wait_time_s": "0"}
    done = subprocess.run(command, check=False, env=busy, capture_output=True, text=True, timeout=SURE_S)
    assert done.returncode == 1
    assert "failed: cluster: Ray did not start on this machine: Timed out waiting for " in done.stderr
    assert "; try again, with fewer other programs if the machine is busy ('" in done.stderr


@pytest.mark.slow
def test_a_cluster_that_is_dead_is_named_before_ray_retries_for_minutes(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = "{}:{}".format(*server.getsockname())
    generate = ["generate", "--config", T2V, "--prompt", "x", "--output", str(tmp_path / "out.mp4")]
    for key, arguments, given in (
        ("cluster.address", [*generate, f"cluster.address={address}"], {}),
        ("RAY_ADDRESS", ["ls"], {"RAY_ADDRESS": address}),
    ):
        done = subprocess.run(
            [*COMMAND, *arguments], check=False, env=NO_CLUSTER | given, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1
        assert f"{key}: '{address}' cannot be joined: nothing answers at {address}: " in done.stderr
        assert "; run `ray status` on its head node, or correct --address" in done.stderr


@pytest.mark.proof
@pytest.mark.parametrize(
    ("sent", "moments", "status"),
    [(signal.SIGINT, ("transformer-0 step",), 130), (signal.SIGTERM, ("waiting for", "replicas ready"), 143)],
    ids=["Ctrl-C in a denoise", "SIGTERM while starting"],
)
def test_a_signal_leaves_no_process_and_no_shared_memory(
    sent: signal.Signals, moments: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    shared_before = helpers.shared_memory_left()
    output = tmp_path / "out.mp4"
    arguments = ["generate", "--config", T2V, "--prompt", "x", "--output", str(output)]
    arguments += ["--num-inference-steps", "100", "--height", "256", "--width", "256", "--num-frames", "33"]
    env = NO_CLUSTER | {"PYTHONFAULTHANDLER": "1"}
    child = subprocess.Popen([*COMMAND, *arguments], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        log = next(line for line in child.stderr if any(moment in line for moment in moments))
        started = psutil.Process(child.pid).children(recursive=True)
        assert len(started) > 3, log
        child.send_signal(sent)
        with suppress(subprocess.TimeoutExpired):
            child.wait(SURE_S)
        child.send_signal(signal.SIGABRT)  # if it hangs, it says where
        assert child.wait(60) == status, (log, child.stderr.read())
    finally:
        child.kill()
    helpers.wait_until(lambda: not any(map(helpers.lives, started)), "processes are left", SURE_S)
    helpers.wait_until(lambda: helpers.shared_memory_left() <= shared_before, "shared memory is left", SURE_S)
    assert not output.exists()


def test_the_page_of_keys_is_that_of_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "config", "--docs")[:2] == (0, to_markdown())
    assert Path("docs/configuration.md").read_text() == to_markdown(), "write it anew: disagg-ray config --docs"
