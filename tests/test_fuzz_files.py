"""Files that a run reads back, mutated: no traceback, no hang, nothing used that is not whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import record, simulate, write_manifest

from disagg_ray import ConfigError, RequestError, cli, load_config
from disagg_ray.batch.manifest import MANIFEST, Folder
from disagg_ray.batch.request_line import parse
from disagg_ray.batch.requests_file import RequestsFile
from disagg_ray.batch.resume import Options, make_plan
from disagg_ray.config.load import to_yaml
from disagg_ray.driver.latents import Wanted, describe, read_latents, write_latents
from disagg_ray.request import check
from disagg_ray.text import printable

pytestmark = pytest.mark.proof

CONFIG = load_config("conf/tiny_t2v.yaml")
GOOD = record(simulate(1, {"encoder": 1, "decoder": 1})[0], "a cat", id="cat", file="cat.mp4")
LINE = json.dumps(asdict(GOOD)).encode()
KEYS = st.sampled_from([*asdict(GOOD), *asdict(GOOD)["request"], *asdict(GOOD)["stages"][0]])
ODD = [1e300, -1, 2**63, 2**70, 1e-320, "", "\ud800", "\0", "\x1b[2J", "../..", "/dev/zero", None, True, [], {}]
VALUE = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(VALUE, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=9))
MANY = settings(max_examples=300, suppress_health_check=list(HealthCheck))
CUTS = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), min_size=1, max_size=4)


def mutate(content: bytes, cuts: list[tuple[int, bytes]]) -> bytes:
    """Put bytes in place of as many others, here and there."""
    changed = bytearray(content)
    for place, new in cuts:
        start = place % len(changed)
        changed[start : start + len(new)] = new
    return bytes(changed)


def replace_values(tree: Any, draw: Any) -> Any:
    """Put something else in place of some values."""
    if draw(st.integers(0, 9)) == 0:
        return draw(TREES)
    if isinstance(tree, dict):
        return {key: replace_values(value, draw) for key, value in tree.items()}
    return [replace_values(value, draw) for value in tree] if isinstance(tree, list) else tree


@given(st.data(), CUTS)
@MANY
def test_reports_and_resumes_of_any_manifest(data: st.DataObject, cuts: list[tuple[int, bytes]]) -> None:
    strange = [json.dumps(replace_values(json.loads(LINE), data.draw)).encode(), mutate(LINE, cuts)]
    with TemporaryDirectory() as name:
        folder, requests = Path(name) / "out", Path(name) / "requests.jsonl"
        requests.write_text('{"id": "cat", "prompt": "a cat"}')
        write_manifest(folder, [GOOD])
        with (folder / MANIFEST).open("ab") as sink:
            sink.write(b"\n".join([*strange, b""]))
        before = (folder / MANIFEST).read_bytes()
        assert cli.main(["report", str(folder)]) == 0
        with RequestsFile(requests, CONFIG) as source, Folder(folder) as out:
            make_plan(source, out, CONFIG, Options(requests, folder, verify=True, skip_invalid=True))
        assert (folder / MANIFEST).read_bytes() == before


@given(CUTS)
@MANY
def test_latents_are_whole_or_not_used(cuts: list[tuple[int, bytes]]) -> None:
    request, shape = GOOD.request, (1, 16, 2, 4, 4)
    assert request is not None
    latents, blocks = torch.ones(shape), {"denoise": "1f"}
    with TemporaryDirectory() as name:
        path = Path(name) / "latents"
        write_latents(path, latents, describe(request, blocks))
        path.write_bytes(mutate(path.read_bytes(), cuts))
        found = read_latents(path, Wanted(request, {"denoise": {"1f"}}, shape))
        assert found is None or torch.equal(found, latents)


REQUEST = {"id": "cat", "prompt": "a cat", "seed": 1, "height": 64, "guidance_scale": 2.0, "format": "gif", "fps": 8}


@given(st.data(), CUTS)
@MANY
def test_request_lines_are_requests_or_faults(data: st.DataObject, cuts: list[tuple[int, bytes]]) -> None:
    raw = json.dumps(replace_values(REQUEST, data.draw)).encode()
    for line in (raw, mutate(raw, cuts)):
        try:
            check(parse(line, Path("/tmp")).request, CONFIG)
        except RequestError as error:
            assert str(error)


@given(
    CUTS, st.sampled_from(("conf/tiny_t2v.yaml", "conf/tiny.yaml", "conf/wan22_i2v_a14b.yaml")), st.text(max_size=40)
)
@settings(MANY, max_examples=60)
def test_configuration_text_is_a_configuration_or_one_line(cuts: list[tuple[int, bytes]], name: str, text: str) -> None:
    with TemporaryDirectory() as folder:
        shutil.copytree("conf", folder, dirs_exist_ok=True)
        path = Path(folder) / Path(name).name
        path.write_bytes(mutate(path.read_bytes(), cuts))
        for overrides in ((), (f"model.path={text}",), (f"{text}=1",), (f"stages.{text}",)):
            try:
                to_yaml(load_config(path, *overrides))
            except ConfigError as error:
                assert printable(str(error), 10_000) == str(error)
