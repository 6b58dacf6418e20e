"""Control videos, masks and references: read whole and equal, or refused in one line before any work."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from test_resume import plan, pretend
from test_vace import SMALL, write_frames

from disagg_ray import LocalPipeline, Request, RequestError, load_config
from disagg_ray.batch.records import FileState
from disagg_ray.batch.request_line import files_of
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import picture_of
from disagg_ray.cli.command import main
from disagg_ray.inputs import read_inputs
from disagg_ray.media.clips import read_frames
from disagg_ray.media.video import encode, load_video
from disagg_ray.models.identity import identify_request
from disagg_ray.request import check, resolve

CONF = Path(__file__).parents[1] / "conf"
CONFIG = load_config(CONF / "tiny_vace.yaml", *SMALL, "defaults.height=64", "defaults.width=96")
BOAT = Request("a boat", seed=1)


@pytest.fixture
def clips(image: Callable[..., Image.Image], tmp_path: Path) -> dict[str, Path]:
    """Give a video of seven frames of 96x64 in every form, and one frame."""
    frames = [image(96, 64, seed) for seed in range(7)]
    folder = write_frames(tmp_path / "folder", frames)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(tmp_path / "one.png")
    (tmp_path / "a.mp4").write_bytes(encode(np.stack(frames) / np.float32(255), 8, "mp4"))
    return {"folder": folder, **{path.name: path for path in tmp_path.iterdir() if path.is_file()}}


def refusal(request: Request, config: Any = CONFIG) -> str:
    """Return the message with which a request is refused."""
    with pytest.raises(RequestError) as caught:
        resolve(request, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(path: Path) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in read_frames(path, "video", 10**6)])


@pytest.mark.parametrize(("codec", "pixel_format"), [("libx264", "yuv420p10le"), ("png", "rgb48be")])
def test_a_video_of_more_bits_is_read_as_one_of_eight(
    clips: dict[str, Path], tmp_path: Path, codec: str, pixel_format: str
) -> None:
    deep = tmp_path / "deep.mov"
    made = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", clips["a.mp4"], "-c:v", codec, "-crf", "1"]
    subprocess.run([*made, "-pix_fmt", pixel_format, deep], check=True)
    assert np.abs(pixels(deep).astype(int) - pixels(clips["a.mp4"])).mean() < 20


def test_every_form_of_a_video_has_its_frames(clips: dict[str, Path]) -> None:
    exact = pixels(clips["folder"])
    assert np.array_equal(pixels(clips["a.webp"]), exact)
    assert np.array_equal(pixels(clips["a.mp4"]), load_video(clips["a.mp4"]))
    assert {name: len(pixels(path)) for name, path in clips.items()} == {
        "folder": 7, "a.gif": 7, "a.webp": 7, "a.mp4": 7, "one.png": 1,
    }  # fmt: skip


@pytest.mark.parametrize("kept", [0.5, 0.999])
@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp"])
def test_a_video_that_was_cut_short_is_refused(clips: dict[str, Path], name: str, kept: float) -> None:
    data = clips[name].read_bytes()
    clips[name].write_bytes(data[: int(kept * len(data))])
    assert refusal(replace(BOAT, video=clips[name], num_frames=9)).startswith(f"video: {str(clips[name])!r} cannot be")


def test_an_mp4_opens_no_other_file(clips: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clips['a.mp4']}\n")
    (tmp_path / "head.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"ffconcat version 1.0\nfile a.mp4\n")
    for name in ("list.mp4", "head.mp4"):
        assert "cannot be read as a video; give a whole mp4" in refusal(replace(BOAT, video=tmp_path / name))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"video": "none.mp4"}, "video: 'none.mp4' is not a file"),
        ({"video": ""}, "video: '' is not a file"),
        ({"video": 3}, "video: it is a int; give the path of a video or of a folder"),
        ({"video": "."}, "video: '.' holds no images; give a folder of frames"),
        ({"video": "x.txt"}, "video: 'x.txt' cannot be read as a video; give a whole mp4"),
        ({"video": "a.mp4", "height": 48, "width": 96}, "has 96x64 pixels, and fitted into 96x48 it is not of that"),
        ({"video": "odd.png"}, "video: 'odd.png' has 95x64 pixels; give frames of the wanted size, in multiples of 16"),
        ({"video": "a.mp4", "mask": "two.gif"}, "mask: 'two.gif' holds 2 frames, for 5 of the video; give as many"),
        ({"mask": "one.png"}, "mask: given without video"),
        ({"reference_images": []}, "invalid reference_images=[]: must be a list of 1 to 4 images"),
        ({"reference_images": "one.png"}, "invalid reference_images='one.png': must be a list of 1 to 4 images"),
        ({"reference_images": ["one.png"] * 5}, "must be a list of 1 to 4 images"),
        ({"reference_images": ["one.png", "no.png"]}, "reference_images[1]: 'no.png' is not a file"),
        (
            {"reference_images": ["a.png,b.png"]},
            "[0]: 'a.png,b.png' is not a file; give several files one by one, as a flag",
        ),
        ({"reference_images": ["one.png"] * 3, "num_frames": 5}, "reference_images=3: must be at most 2 images, one a"),
        ({"reference_images": ["one.png"] * 2, "video": "one.png"}, "images, one a latent frame; 1 frames of control"),
        (
            {"reference_images": ["one.png", "thin.png"]},
            "invalid reference_images[1]='900x8': must have 8 pixels a side",
        ),
        ({"reference_images": ["small.png"]}, "invalid reference_images[0]='7x64': must have 8 pixels a side"),
        ({"conditioning_scale": -1}, "invalid conditioning_scale=-1: must be a finite number of at least 0"),
        ({"conditioning_scale": [1, 2]}, "invalid conditioning_scale=[1, 2]: must be a number, not a list"),
        ({"video": "a.mp4", "num_frames": 13}, "invalid num_frames=13: must be at most limits.max_frames=9"),
        ({"image": "one.png"}, "image: given, but a model of task vace takes none"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    clips: dict[str, Path], image: Any, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], says: str
) -> None:
    folder = clips["a.mp4"].parent
    monkeypatch.chdir(folder)
    for path in [*clips["folder"].iterdir()] if asked.get("video") == "." else []:
        path.unlink()
    if asked.get("video") == ".":
        monkeypatch.chdir(clips["folder"])
    (folder / "x.txt").write_text("no video")
    for name, size in {"odd": (95, 64), "thin": (900, 8), "small": (7, 64)}.items():
        image(*size).save(folder / f"{name}.png")
    image(96, 64).save(folder / "two.gif", save_all=True, append_images=[image(96, 64, 1)])
    assert says in refusal(replace(BOAT, **asked))


def test_a_video_with_no_size_within_the_default_area_asks_for_one(clips: dict[str, Path]) -> None:
    config = load_config(CONF / "tiny_vace.yaml", *SMALL, "defaults.height=32", "defaults.width=32")
    says = refusal(replace(BOAT, video=clips["a.mp4"]), config)
    assert "is within the default area of 32x32; give height and width" in says
    assert resolve(replace(BOAT, video=clips["a.mp4"], height=64, width=96), config)[0].width == 96


def test_a_frame_over_the_limit_is_refused(clips: dict[str, Path]) -> None:
    config = load_config(CONF / "tiny_vace.yaml", *SMALL, "limits.max_image_pixels=6000")
    for name in ("folder", "a.gif", "a.mp4"):
        assert "limits.max_image_pixels=6000" in refusal(replace(BOAT, video=clips[name]), config)


@pytest.mark.parametrize("asked", [{"video": "a.mp4"}, {"mask": "a.png"}, {"reference_images": ["a.png"]}])
def test_other_tasks_name_those_that_have_the_field(asked: dict[str, Any]) -> None:
    name = next(iter(asked))
    for conf in ("tiny_t2v.yaml", "tiny_qwen_image.yaml"):
        said = refusal(replace(BOAT, **asked), load_config(CONF / conf))
        assert said.startswith(f"{name}: given, but a model of task") and "vace of wan)" in said
    assert "conditioning_scale: given" in refusal(
        replace(BOAT, conditioning_scale=1.0), load_config(CONF / "tiny_t2v.yaml")
    )


@pytest.mark.parametrize(
    ("given", "sides", "size"),
    [
        ((96, 64), {}, (64, 96)),
        ((192, 128), {}, (64, 96)),
        ((192, 128), {"height": 32}, (32, 48)),
        ((48, 32), {}, (32, 48)),
        ((64, 128), {}, (96, 48)),
        ((80, 60), {}, (48, 64)),
        ((95, 64), {}, None),
    ],
)
def test_a_size_left_out_is_one_that_stock_keeps(
    image: Any, tmp_path: Path, given: tuple[int, int], sides: dict[str, int], size: tuple[int, int] | None
) -> None:
    image(*given).save(tmp_path / "frame.png")
    request = replace(BOAT, video=tmp_path / "frame.png", **sides)
    if size is None:
        assert "has 95x64 pixels" in refusal(request)
    else:
        resolved, pictures = resolve(request, CONFIG)
        assert (resolved.height, resolved.width) == size == pictures["video"].shape[1:3]  # type: ignore[union-attr]


def test_frames_left_out_are_those_of_the_video(clips: dict[str, Path]) -> None:
    counts = {n: resolve(replace(BOAT, video=clips["a.mp4"], num_frames=n), CONFIG) for n in (None, 1, 5, 9)}
    assert {n: (r.num_frames, len(p["video"])) for n, (r, p) in counts.items()} == {  # type: ignore[arg-type]
        None: (5, 5), 1: (1, 1), 5: (5, 5), 9: (9, 7),
    }  # fmt: skip


def test_an_input_that_changed_is_another_request(clips: dict[str, Path], image: Any) -> None:
    request = replace(BOAT, video=clips["folder"], mask=clips["one.png"], reference_images=[clips["one.png"]], id="a")
    before = identify_request(resolve(request, CONFIG)[0])
    assert identify_request(resolve(replace(request, video=clips["a.webp"]), CONFIG)[0]) == before
    image(96, 64, 99).save(clips["folder"] / "002.png")
    assert identify_request(resolve(request, CONFIG)[0]) != before


def test_lines_name_files_from_their_own_folder(clips: dict[str, Path], tmp_path: Path) -> None:
    line = {"prompt": "a", "video": "folder", "mask": "one.png", "reference_images": ["one.png", "a.gif"]}
    bad = [{"prompt": "b", "video": "gone"}, {"prompt": "c", "reference_images": "one.png"}]
    bad += [{"prompt": "d", "video": ""}]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, [line, *bad])))
    faults: list[str] = []
    with RequestsFile(path, CONFIG) as source:
        source.scan(lambda _, fault: faults.append(fault))
        request = source.line(0).request
    assert {name: file.name for name, file in files_of(request).items()} == {
        "video": "folder", "mask": "one.png", "reference_images[0]": "one.png", "reference_images[1]": "a.gif",
    }  # fmt: skip
    assert resolve(request, CONFIG)[0].num_frames == 5
    assert "is not a file" in faults[0] and "is no list of paths" in faults[1] and "video: '' is no path" in faults[2]


def test_a_second_run_notices_another_video(clips: dict[str, Path], image: Any, tmp_path: Path) -> None:
    lines = [{"id": "cat", "prompt": "a", "video": "folder", "reference_images": ["one.png"]}]
    plan(tmp_path, lines, CONFIG)
    request = replace(BOAT, video=clips["folder"], reference_images=[clips["one.png"]])
    digests = {name: given.sha256 for name, given in read_inputs(request, CONFIG).about.items()}
    states = {name: picture_of(path, digests[name]) for name, path in files_of(request).items()}
    pretend(tmp_path, "cat", config=CONFIG, pictures=states)
    os.utime(clips["folder"] / "002.png", ns=(1, 10**18 * 4))
    assert plan(tmp_path, lines, CONFIG)[1].num_done == 1, "the same frames, written anew"
    image(96, 64, 99).save(clips["folder"] / "002.png")
    with pytest.raises(RequestError, match="1 lines of"):
        plan(tmp_path, lines, CONFIG)
    assert all(isinstance(state, FileState) for state in states.values())


def test_flags_make_a_video(
    checkpoint: Any, clips: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--video", clips["a.mp4"], "--mask", clips["one.png"], "--conditioning-scale", "0.5"]
    flags += [
        "--reference-images",
        clips["one.png"],
        "--reference-images",
        clips["a.gif"],
        "--output",
        tmp_path / "o.npy",
    ]
    model = [f"model.path={checkpoint('tiny-vace')}", *SMALL, "model.max_sequence_length=64"]
    start = ["generate", "--local", "--quiet", "--config", CONF / "tiny_vace.yaml", "--prompt", "a", "--seed", "3"]
    assert main([str(part) for part in [*start, *flags, *model, "defaults.num_inference_steps=2"]]) == 0
    assert np.load(tmp_path / "o.npy").shape == (5, 32, 48, 3)
    assert check(replace(BOAT, video=clips["a.mp4"]), CONFIG).height == 16, "a placeholder"


def test_images_from_memory_are_references(checkpoint: Any, image: Any) -> None:
    config = load_config(CONF / "tiny_vace.yaml", f"model.path={checkpoint('tiny-vace')}", *SMALL)
    request = replace(BOAT, reference_images=[image(40, 30)], num_frames=1, num_inference_steps=1, format="npy")
    with LocalPipeline(config) as pipeline:
        assert pipeline.generate(request).frames.shape == (1, 64, 64, 3)  # type: ignore[union-attr]
