"""`speed`: what presets set, and what they leave to the user."""

from pathlib import Path

import pytest

from disagg_ray import load_config
from disagg_ray.cli.command import main
from disagg_ray.errors import ConfigError

CONF = Path(__file__).parent.parent / "conf"
T2V, I2V = CONF / "wan21_t2v_1_3b.yaml", CONF / "wan21_i2v_14b_480p.yaml"


def test_fast_sets_what_is_fast_at_the_default_size() -> None:
    stages = load_config(T2V, "speed=fast").stages
    denoiser, vae = stages["transformer"].denoiser, stages["decoder"].vae
    assert (denoiser.attention, denoiser.compile, denoiser.fuse) == ("auto", "default", True)
    assert (vae.dtype, vae.channels_last, vae.compile) == ("float16", True, True)
    assert stages["transformer"].warm_up == stages["decoder"].warm_up == [[480, 832, 81]]
    assert stages["encoder"] == load_config(T2V).stages["encoder"]


def test_smallest_offloads_the_large_models_and_decodes_in_tiles() -> None:
    stages = load_config(T2V, "speed=smallest").stages
    assert [stages[name].offload for name in ("encoder", "transformer", "decoder")] == ["group", "group", "none"]
    assert stages["decoder"].vae.tile_pixels == 0
    assert load_config(CONF / "wan21_t2v_1_3b_tiles.yaml", "speed=smallest").num_parts > 1


@pytest.mark.parametrize("speed", ["fast", "smallest"])
def test_keys_of_the_user_stay_and_stages_on_the_cpu_are_left_alone(speed: str) -> None:
    own = ("stages.transformer.denoiser.compile=null", "stages.transformer.offload=none")
    own += ("stages.decoder.dtype=bfloat16", "stages.decoder.vae.tile_pixels=5")
    config = load_config(T2V, f"speed={speed}", *own)
    transformer, decoder = config.stages["transformer"], config.stages["decoder"]
    assert (transformer.denoiser.compile, transformer.offload) == (None, "none")
    assert (decoder.vae.tile_pixels, config.dtype_of("decoder", "vae")) == (5, "bfloat16")
    tiny = CONF / "tiny_t2v.yaml"
    assert load_config(tiny, f"speed={speed}").stages == load_config(tiny).stages


@pytest.mark.parametrize("speed", ["fast", "smallest"])
@pytest.mark.parametrize("path", sorted(CONF.glob("wan2*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_takes_every_preset_split_and_fused(path: Path, speed: str) -> None:
    split, fused = load_config(path, f"speed={speed}"), load_config(path, f"speed={speed}", "fused=true")
    assert {split.dtype_of(name, "vae") for name, stage in split.stages.items() if stage.vae.compile} <= {"float16"}
    assert fused.stages["fused"].denoiser == split.stages["transformer"].denoiser


def test_fast_takes_an_explicit_automatic_attention() -> None:
    assert load_config(T2V, "speed=fast", "stages.transformer.denoiser.attention=auto") == load_config(
        T2V, "speed=fast"
    )


def test_eight_bit_storage_is_not_compiled() -> None:
    config = load_config(T2V, "speed=fast", "stages.transformer.denoiser.quantization=fp8_storage")
    assert config.stages["transformer"].denoiser.compile is None


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^invalid speed='quick': must be one of exact, fast, smallest"):
        load_config(T2V, "speed=quick")


def test_the_command_marks_what_a_preset_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", str(I2V), "--speed", "fast", "stages.transformer.denoiser.fuse=false"]) == 0
    lines = capsys.readouterr().out.splitlines()
    marked = [line.split("#")[0].strip() for line in lines if line.endswith("# speed=fast")]
    assert marked.count("channels_last: true") == 2  # the VAE encodes the image too
    assert {"attention: auto", "compile: default", "dtype: float16", "warm_up:"} <= set(marked)
    assert not any(line.startswith("fuse") for line in marked)
    assert main(["config", "--config", str(I2V)]) == 0
    assert "#" not in capsys.readouterr().out
