"""What is written in a file or an override is read as its field's type says, and nothing of foreign files is shown."""

import time
from pathlib import Path

import pytest

from disagg_ray import Config, ConfigError, load_config
from disagg_ray.config.load import to_yaml

T2V = Path(__file__).parent.parent / "conf" / "tiny_t2v.yaml"


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "model.yaml"
    path.write_text(f"base: {T2V}\n{text}", encoding="utf-8")
    return load_config(path, *overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """Return the message with which a configuration is refused: one harmless line."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    assert str(caught.value).isprintable()
    assert caught.value.__traceback__ is not None
    return str(caught.value)


TEXTS = ["0123456", "12e4567", "1_000", "0x1f", "no", "on", "true", "2024-01-01", "12:30", "1.0", ".5", "-"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_field_keeps_what_looks_like_something_else(text: str, tmp_path: Path) -> None:
    for config in (load(tmp_path, f"model: {{revision: {text}}}"), load(tmp_path, "", f"model.revision={text}")):
        assert config.model.revision == text
        printed = tmp_path / "printed.yaml"
        printed.write_text(to_yaml(config))
        assert load_config(printed) == config


@pytest.mark.parametrize(
    "text", ["", "no", "a: b", "a b: c, d", "${x} of $5", "x #1", "- a", "a=b", "'tis", "100%", "!"]
)
def test_an_override_s_text_is_taken_as_it_is(text: str) -> None:
    assert load_config(T2V, f"defaults.negative_prompt={text}").defaults.negative_prompt == text


def test_an_override_s_text_may_be_quoted_as_in_yaml() -> None:
    assert load_config(T2V, "defaults.negative_prompt='a: b'").defaults.negative_prompt == "a: b"
    assert load_config(T2V, 'defaults.negative_prompt="null"').defaults.negative_prompt == "null"


@pytest.mark.parametrize("text", ["no", "${x}", "12e4567", '"a: b"', "|\n    two\n    lines"])
def test_a_file_s_text_is_not_read_as_anything_else(text: str, tmp_path: Path) -> None:
    prompt = load(tmp_path, f"defaults:\n  negative_prompt: {text}\n").defaults.negative_prompt
    assert prompt == {'"a: b"': "a: b", "|\n    two\n    lines": "two\nlines\n"}.get(text, text)


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_is_none_where_there_may_be_none(null: str, tmp_path: Path) -> None:
    assert load(tmp_path, f"model: {{revision: {null}}}").model.revision is None
    assert load(tmp_path, "model: {revision: abc}", f"model.revision={null}").model.revision is None


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("1_000", 1000), ("1e3", 1000), ("17.0", 17), ("+5", 5), ('"5"', 5)]
)
def test_whole_numbers_are_read_in_tens_however_they_are_written(text: str, number: int, tmp_path: Path) -> None:
    assert load(tmp_path, f"limits: {{max_queued: {text}}}").limits.max_queued == number


@pytest.mark.parametrize("section", ["defaults:", "defaults:\n  # fps: 5", "limits: {}", "model:", "cluster:\nstages:"])
def test_an_empty_section_changes_nothing(section: str, tmp_path: Path) -> None:
    assert load(tmp_path, section) == load(tmp_path, "")


def test_an_empty_mapping_takes_away_what_a_file_below_put_there(tmp_path: Path) -> None:
    label = "stages: {encoder: {label_selector: {zone: no}}}"
    assert load(tmp_path, label).stages["encoder"].label_selector == {"zone": "no"}
    assert load(tmp_path, label, "stages.encoder.label_selector={}").stages["encoder"].label_selector == {}


def test_a_label_may_have_dots_in_its_name() -> None:
    config = load_config(T2V, "stages.encoder.label_selector.ray.io/accelerator-type=H100")
    assert config.stages["encoder"].label_selector == {"ray.io/accelerator-type": "H100"}


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("stages.tranformer.replicas=2", "did you mean the stage transformer?"),
        ("stages.tranformer=null", "there is no such stage; did you mean transformer?"),
        ("share_gpu=[encodr, decoder]", "did you mean encoder?"),
        ("model.task=tv2", "did you mean t2v?"),
        ("model.dtype.vae=bfloat", "did you mean bfloat16?"),
        ("model.scheduler=unipcc", "did you mean unipc?"),
        ("transport.protocol=rmda", "did you mean rdma?"),
        ("stages.decoder.offload=groups", "did you mean group?"),
        ("stages.decoder.placement=spred", "did you mean spread?"),
        ("stages.decoder.device=cuda0", "did you mean cuda?"),
        ("stages.transformer.denoiser.quantization=fp8storage", "did you mean fp8_storage?"),
        ("stages.transformer.denoiser.step_cache.method=firstblock", "did you mean first_block?"),
        ("stages.transformer.denoiser.loras=[{pth: a}]", "did you mean stages.transformer.denoiser.loras[0].path?"),
        ("stages.transformer.groups.fast.replica=2", "did you mean stages.transformer.groups.fast.replicas?"),
    ],
)
def test_a_misspelt_name_or_word_is_refused_with_the_nearest(override: str, near: str, tmp_path: Path) -> None:
    assert near in refusal(tmp_path, "", override)


def test_a_remedy_says_where_null_is_valid_too(tmp_path: Path) -> None:
    said = refusal(tmp_path, "", "stages.encoder.num_threads=0")
    assert said == "invalid stages.encoder.num_threads=0: must be at least 1 or null"
    assert refusal(tmp_path, "", "limits.max_frames=0") == "invalid limits.max_frames=0: must be at least 1"


def test_a_misspelt_group_is_no_new_one(tmp_path: Path) -> None:
    groups = "stages: {transformer: {groups: {fast: {replicas: 2}, slow: {replicas: 1}}}}"
    said = refusal(tmp_path, groups, "stages.transformer.groups.fats.num_cpus=2")
    assert said == "stages.transformer.groups.fats: no such group; did you mean fast? A new one needs replicas"
    named = load(tmp_path, groups, "stages.transformer.groups.fats.replicas=2")
    assert set(named.stages["transformer"].groups) == {"fast", "slow", "fats"}


@pytest.mark.parametrize(
    "text",
    [
        "root:x:0:0:hunter2",
        "root:$6$hunter2:1::\nbin:*:1::",
        "password: hunter2",
        "a: {hunter2 is it: 1}",
        "a: hunter2: c",
        "[model]\nhunter2 = 1",
        "key: 'hunter2",
        "hunter2\x00",
        "*hunter2",
        "&a [*hunter2]",
        "hunter2: 1\nhunter2: 2",
        "!!python/object:os.system hunter2",
        "{model: {path: [hunter2",
        "x: %hunter2\n- y",
    ],
)
def test_a_file_that_is_not_ours_is_named_and_not_shown(text: str, tmp_path: Path) -> None:
    foreign = tmp_path / "shadow"
    foreign.write_text(text)
    (tmp_path / "model.yaml").write_text(f"base: {foreign}\nmodel: {{path: x}}\nstages: {{a: {{blocks: [b]}}}}")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "model.yaml")
    assert "shadow" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'base: "a\\0b"', 'base: "~\\0"', "base: [a]", "base: {a: b}", "base: ${oc.env:HOME}", "base: /dev/zero",
        'model: {path: "a\\0b"}', "model: {path: '${${x}}'}", "model: {path: '${oc.env:HOME}'}", "${x}: 1",
        "? [a, b]\n: c", "? {a: b}\n: c", "a: &x [*x]", "&x a: *x", "[" * 5000, "{a: " * 5000,
        '"\\e[31mred": 1', 'stages: {"\\e]0;x\\a": {blocks: [a]}}', 'stages: {encoder: {"\\e[2J": 1}}',
        'model: {task: "\\e[2J"}', 'share_gpu: ["\\e[2J", "\\u202ea"]', 'stages: {encoder: {device: "\\x9b2J"}}',
        'stages: {encoder: {label_selector: {a: {"\\e": 1}}}}', "stages: {encoder: }", "model: {path: !x y: z}",
    ],
)  # fmt: skip
def test_odd_text_is_refused_in_one_harmless_line(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text)


def test_what_yaml_expects_is_said_and_not_what_the_file_holds(tmp_path: Path) -> None:
    message = refusal(tmp_path, "", "stages.transformer.parallel={cfg: 2")
    assert message.endswith("is not YAML: line 1, column 8: expected ',' or '}', but got '<stream end>'")
    assert refusal(tmp_path, 'a: "\\xyz"').endswith(": expected escape sequence of 2 hexadecimal numbers")


def test_aliases_that_stand_for_billions_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
    )
    began = time.process_time()
    assert "expands to over 100000 values" in refusal(tmp_path, bomb)
    assert time.process_time() - began < 60


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    assert "is over 1048576 bytes" in refusal(tmp_path, "#" * 2**20)


def test_passwords_are_hidden_where_a_configuration_is_shown(tmp_path: Path) -> None:
    config = load_config(T2V, "transport.metadata_server=redis://user:hun:ter2@host:6379/0?token=hunter2&x=1")
    printed = to_yaml(config)
    assert "metadata_server: redis://user:***@host:6379/0?token=***&x=1\n" in printed
    assert "hunter2" not in refusal(tmp_path, "", "transport.protocol=redis://:hunter2@host")
    masked = refusal(tmp_path, "", "transport.metadata_server=redis://user:***@host")
    assert masked.endswith("must be P2PHANDSHAKE or an address, with its password for ***")
