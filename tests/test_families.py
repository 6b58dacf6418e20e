"""One place says what a family of models is, and nothing outside `models` knows one by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
from helpers import copy_changed

from disagg_ray import CheckpointError, load_config
from disagg_ray.models.families import FAMILIES, model_of
from disagg_ray.models.model import Model
from disagg_ray.models.random import make_checkpoint
from disagg_ray.replica.stage import Stage

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "disagg_ray"
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "models" not in path.parents]


def named(text: str) -> list[str]:
    """Return where a text names a family, alone or at the beginning of a class's name."""
    names = {family.name for family in FAMILIES.values()} | {family.title for family in FAMILIES.values()}
    pattern = "|".join(rf"(?<![a-z]){re.escape(name)}(?![a-z])" for name in names)
    found = re.finditer(pattern, text, re.IGNORECASE)
    classes = re.findall(
        "|".join(rf"\b{family.title.replace('-', '')}[A-Z0-9]\w*" for family in FAMILIES.values()), text
    )
    return [text[match.start() - 20 : match.end() + 20] for match in found] + classes


def test_the_search_finds_names() -> None:
    assert named("from disagg_ray.models.wan import random") and named("a Wan 2.2 model") and named("WanPipeline")
    assert not named("what is wanted, and who wants it; WANTED")


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_outside_models_names_a_family(path: Path) -> None:
    assert not named(path.read_text())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_has_all_its_parts(family: Any) -> None:
    assert {name: hasattr(diffusers, name) for name in family.pipelines} == dict.fromkeys(family.pipelines, True)
    assert isinstance(family.part("model").MODEL, Model)
    assert any(name.startswith("tiny-") for name in family.part("shapes").SHAPES)
    assert family.part("text").prepare("a cat").count("a cat") == 1
    assert family.part("geometry").tasks_of({"_class_name": family.pipelines[0]})[0] in family.tasks


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_transformer_finds_its_family_by_its_class(family: Any) -> None:
    for class_name in family.components["transformer"].classes:
        assert model_of(type(class_name, (), {})()) is family.part("model").MODEL


def test_a_stage_computes_with_the_configurations_of_components_it_lacks(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy_changed(checkpoint("tiny-t2v"), tmp_path, "vae/config.json", {"patch_size": 2})
    config = load_config(ROOT / "conf" / "tiny_t2v.yaml", f"model.path={folder}")
    with pytest.raises(
        CheckpointError, match=r"takes vae_scale_factor_spatial of .* for 8, and its configurations say 16"
    ):
        Stage("transformer", config)


def test_a_latent_of_other_channels_than_wan_s_is_taken_from_the_vae(tmp_path: Path) -> None:
    from disagg_ray.models.wan.shapes import SHAPES

    shape = SHAPES["tiny-t2v"]
    vae = replace(shape.vae, z_dim=8, latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)
    transformer = replace(shape.transformer, in_channels=8, out_channels=8)
    SHAPES["eight"] = replace(shape, name="eight", vae=vae, transformer=transformer)
    try:
        folder = make_checkpoint("eight", tmp_path / "eight")
    finally:
        del SHAPES["eight"]
    config = load_config(ROOT / "conf" / "tiny_t2v.yaml", f"model.path={folder}")
    assert Stage("transformer", config).geometry.latent_channels == 8
