"""Every key of the configuration does something: a change shows, or is refused by name. A new key needs an entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from disagg_ray import Config, ConfigError, DisaggError, Pipeline, Request, load_config
from disagg_ray.config.typed import known_keys
from disagg_ray.driver.address import find_cluster
from disagg_ray.driver.calls import replicas_of
from disagg_ray.driver.cluster import own_cluster
from disagg_ray.driver.placement import Placement
from disagg_ray.environment import cache_folder
from disagg_ray.graph import build_graph
from disagg_ray.models.checkpoint import open_checkpoint
from disagg_ray.replica.sizing import driver_pool_bytes, pool_bytes
from disagg_ray.replica.stage import Stage
from disagg_ray.request import resolve
from disagg_ray.service.latents_store import LatentsStore

TESTS = Path(__file__).parent
CONF = TESTS.parent / "conf"
T, D = "stages.transformer", "stages.transformer.denoiser"
GPU = f"{T}.num_gpus=1"
GROUPS = f"{T}.groups={{fast: {{replicas: 2, num_gpus: 1}}, slow: {{num_gpus: 1}}}}"
FAST = f"{T}.groups.fast"


@dataclass(frozen=True)
class Seen:
    """A change that shows in what the package makes of the configuration."""

    changes: str
    look: Callable[[Config], Any]
    given: tuple[str, ...] = ()
    conf: str = "tiny_t2v"


@dataclass(frozen=True)
class Refused:
    """A change that does nothing here, and says so."""

    changes: str
    says: str
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """A change that another test shows."""

    by: str


def request(config: Config) -> Any:
    images = {"image": Image.new("RGB", (64, 48))} if config.model.task == "i2v" else {}
    return resolve(Request("a cat", seed=1, id="x", **images), config)[0]


def ask(**asked: Any) -> Callable[[Config], str]:
    """Return how a request is answered."""

    def answer(config: Config) -> str:
        try:
            resolve(Request(**{"prompt": "a cat"} | asked), config)
        except DisaggError as error:
            return str(error)
        return "taken"

    return answer


def actors(config: Config) -> Any:
    """Return what Ray is asked for, replica by replica."""
    placement = Placement("none")
    return [(replica.name, replica.group, placement.options(config, replica)) for replica in replicas_of(config)]


def checkpoint(config: Config) -> Any:
    try:
        found = open_checkpoint(config.model)
    except DisaggError as error:
        return str(error)
    return found.folder, found.geometry


def stages(config: Config) -> dict[str, Stage]:
    made = {name: Stage(name, config) for name in config.stages}
    graph = build_graph([stage.ports for stage in made.values()])
    for stage in made.values():
        stage.connect(graph)
    return made


def graph(config: Config) -> Any:
    return {name: stage.ports for name, stage in stages(config).items()}


def pools(config: Config) -> Any:
    made = stages(config)
    connected = build_graph([stage.ports for stage in made.values()])
    geometry = made["encoder"].geometry
    return {name: pool_bytes(config, stage) for name, stage in made.items()}, driver_pool_bytes(
        config, connected, geometry
    )


def precision(config: Config) -> Any:
    components = ("text_encoder", "image_encoder", "transformer", "vae")
    return [config.dtype_of(name, component) for name in config.stages for component in components]


def scheduler(config: Config) -> Any:
    stage = stages(config)["transformer"]
    stage.load()
    made = stage.component("scheduler")
    return type(made).__name__, made.config.get("flow_shift", made.config.get("shift"))


def threads(config: Config) -> Any:
    return {name: stage.torch_threads for name, stage in config.stages.items()}


def bounds(config: Config) -> Any:
    return [(stage.least_replicas, stage.most_replicas) for stage in config.stages.values()]


def turns(config: Config) -> Any:
    return {name: config.takes_turns(name) for name in config.stages}


def joined(config: Config) -> Any:
    try:
        find_cluster(config.cluster.address)
    except DisaggError as error:
        return str(error)
    return "joined"


def kept(config: Config) -> list[str]:
    """Return which of two files of 1 kB are still there after evicting."""
    keep = LatentsStore("keys", config.service.latents_bytes, config.service.latents_expire_s)
    for path in (cache_folder() / "service/keys/a/1", cache_folder() / "service/keys/a/2"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1000))
    keep.evict()
    left = sorted(path.name for path in (cache_folder() / "service/keys").glob("*/*"))
    keep.clear()
    return left


OPTIONS = "test_options.py::"
REPLAY = "test_replay.py::"
SCALER = "test_autoscale.py::"
KEYS: dict[str, Seen | Refused | Shown] = {
    "model.path": Seen("model.path=builtin:none", checkpoint),
    "model.family": Shown("test_qwen_image.py::test_other_models_are_refused_by_name"),
    "model.task": Seen("model.task=i2v", checkpoint),
    "model.revision": Seen("model.revision=null", checkpoint, ("model.path=a/b", "model.revision=../x")),
    "model.flow_shift": Seen("model.flow_shift=7", scheduler),
    "model.scheduler": Seen("model.scheduler=euler", scheduler),
    "model.sigmas": Seen("model.sigmas=[1.0,0.5]", request),
    "model.boundary_ratio": Seen("model.boundary_ratio=0.5", checkpoint, conf="tiny_a14b_t2v"),
    "model.max_sequence_length": Seen("model.max_sequence_length=33", checkpoint),
    "model.dtype.text_encoder": Seen("model.dtype.text_encoder=float16", precision),
    "model.dtype.image_encoder": Seen("model.dtype.image_encoder=float16", precision, conf="tiny_i2v"),
    "model.dtype.transformer": Seen("model.dtype.transformer=float16", precision),
    "model.dtype.vae": Seen("model.dtype.vae=float16", precision),
    "defaults.height": Seen("defaults.height=48", request),
    "defaults.width": Seen("defaults.width=48", request),
    "defaults.num_frames": Seen("defaults.num_frames=13", request),
    "defaults.num_inference_steps": Seen("defaults.num_inference_steps=3", request),
    "defaults.guidance_scale": Seen("defaults.guidance_scale=3", request),
    "defaults.guidance_scale_2": Seen("defaults.guidance_scale_2=7", request, conf="tiny_a14b_t2v"),
    "defaults.audio_guidance_scale": Seen("defaults.audio_guidance_scale=7", request, conf="tiny_ltx2"),
    "defaults.negative_prompt": Seen("defaults.negative_prompt=dull", request),
    "defaults.fps": Seen("defaults.fps=3", request),
    "limits.max_pixels": Seen("limits.max_pixels=5000", ask(height=64, width=80)),
    "limits.max_frames": Seen("limits.max_frames=17", ask(num_frames=21)),
    "limits.max_steps": Seen("limits.max_steps=20", ask(num_inference_steps=21)),
    "limits.max_prompt_chars": Seen("limits.max_prompt_chars=9", ask(prompt="ten letters")),
    "limits.max_image_pixels": Seen(
        "limits.max_image_pixels=9", ask(image=Image.fromarray(np.zeros((4, 4, 3), np.uint8))), conf="tiny_i2v"
    ),
    "limits.max_queued": Shown(REPLAY + "test_a_full_queue_refuses_who_would_not_wait"),
    "stages.*.blocks": Seen(f"{T}.blocks=[text_encoder,denoise]", graph, ("stages.encoder.blocks=[text_encoder]",)),
    "stages.*.replicas": Seen(f"{T}.replicas=2", actors),
    "stages.*.min_replicas": Seen(f"{T}.replicas={{min: 2, max: 3}}", bounds, (f"{T}.replicas={{min: 1, max: 3}}",)),
    "stages.*.max_replicas": Seen(f"{T}.replicas={{min: 1, max: 4}}", bounds, (f"{T}.replicas={{min: 1, max: 3}}",)),
    "stages.*.num_gpus": Seen(f"{T}.num_gpus=1", actors),
    "stages.*.num_cpus": Seen(f"{T}.num_cpus=2", actors),
    "stages.*.memory": Seen(f"{T}.memory=1000", actors),
    "stages.*.resources": Seen(f"{T}.resources.disk=1", actors),
    "stages.*.label_selector": Seen(f"{T}.label_selector.zone=a", actors),
    "stages.*.accelerator_type": Seen(f"{T}.accelerator_type=H100", actors, (GPU,)),
    "stages.*.placement": Seen(f"{T}.placement=spread", actors),
    "stages.*.groups": Seen(GROUPS, actors),
    "stages.*.groups.*.replicas": Seen(f"{FAST}.replicas=3", actors, (GROUPS,)),
    "stages.*.groups.*.accelerator_type": Seen(f"{FAST}.accelerator_type=H100", actors, (GROUPS,)),
    "stages.*.groups.*.num_gpus": Seen(f"{FAST}.num_gpus=0.5", actors, (GROUPS,)),
    "stages.*.groups.*.num_cpus": Seen(f"{FAST}.num_cpus=3", actors, (GROUPS,)),
    "stages.*.groups.*.memory": Seen(f"{FAST}.memory=1000", actors, (GROUPS,)),
    "stages.*.groups.*.resources": Seen(f"{FAST}.resources={{disk: 1}}", actors, (GROUPS,)),
    "stages.*.groups.*.label_selector": Seen(f"{FAST}.label_selector={{zone: a}}", actors, (GROUPS,)),
    **{
        f"stages.*.{group}parallel.{key}": Shown("test_gangs.py::test_the_ranks_of_a_replica_are_configured")
        for group in ("", "groups.*.")
        for key in ("cfg", "ulysses", "ring", "shard_weights", "spread")
    },
    **{
        f"stages.*.{group}parallel.rows": Shown("test_gang_decoder.py::test_mixed_sizes_are_the_videos_of_one_process")
        for group in ("", "groups.*.")
    },
    "stages.*.num_threads": Seen(f"{T}.num_threads=3", threads),
    "stages.*.dtype": Seen(f"{T}.dtype=float16", precision),
    "stages.*.device": Seen(f"{T}.device=cpu", turns, (f"{T}.num_gpus=0.5",)),
    "stages.*.max_vram_bytes": Refused(f"{T}.max_vram_bytes=1000", "must be null: the stage runs on the CPU"),
    "stages.*.cache_bytes": Seen("stages.encoder.cache_bytes=1000000", pools),
    "stages.*.denoiser.attention": Shown(OPTIONS + "test_option_changes_nothing_but_rounding"),
    "stages.*.denoiser.compile": Shown(OPTIONS + "test_compiled_denoiser_goes_with_cache_and_offload"),
    "stages.*.denoiser.fuse": Shown("test_attention.py::test_the_fused_rotary_embedding_equals_stock_s"),
    "stages.*.denoiser.step_cache.method": Shown(OPTIONS + "test_step_cache_equals_stock_s_and_starts_empty"),
    "stages.*.denoiser.step_cache.threshold": Shown(OPTIONS + "test_step_cache_equals_stock_s_and_starts_empty"),
    "stages.*.denoiser.step_cache.interval": Shown(OPTIONS + "test_step_cache_equals_stock_s_and_starts_empty"),
    "stages.*.denoiser.step_cache.ratios": Shown(OPTIONS + "test_step_cache_equals_stock_s_and_starts_empty"),
    "stages.*.denoiser.quantization": Shown(OPTIONS + "test_eight_bit_weights_are_smaller_and_near"),
    "stages.*.denoiser.loras": Shown(OPTIONS + "test_lora_counts_by_its_strength"),
    "stages.*.denoiser.loras[*].path": Shown(OPTIONS + "test_two_loras_equal_stock_s"),
    "stages.*.denoiser.loras[*].strength": Shown(OPTIONS + "test_lora_counts_by_its_strength"),
    "stages.*.denoiser.loras[*].transformer": Shown(OPTIONS + "test_two_loras_equal_stock_s"),
    "stages.*.vae.dtype": Shown("test_speed.py::test_keys_of_the_user_stay_and_stages_on_the_cpu_are_left_alone"),
    "stages.*.vae.channels_last": Shown(OPTIONS + "test_option_changes_nothing_but_rounding"),
    "stages.*.vae.compile": Shown(OPTIONS + "test_compiled_vae_makes_the_same_frames"),
    "stages.*.vae.autotune": Refused("stages.decoder.vae.autotune=true", "must be false: the stage runs on the CPU"),
    "stages.*.vae.tile_pixels": Shown(OPTIONS + "test_tiled_decode_differs_and_equals_stock_s"),
    "stages.*.offload": Refused(f"{T}.offload=group", "must be none: the stage runs on the CPU"),
    "stages.*.warm_up": Shown(OPTIONS + "test_every_stage_of_every_task_warms_up"),
    "share_gpu": Shown("test_placement.py::test_stages_that_share_a_gpu_lie_in_one_bundle_replica_by_replica"),
    "gpu_turns": Seen("gpu_turns=false", turns, (f"{T}.num_gpus=0.5",)),
    "transport.protocol": Shown("test_transfer.py::test_rdma_is_refused_where_there_is_no_device_for_it"),
    "transport.device_name": Refused("transport.device_name=m", "it is for rdma or auto", ("transport.protocol=tcp",)),
    "transport.admit": Shown("test_guard.py::test_ports_for_this_machine_alone_hear_no_other_address"),
    "transport.metadata_server": Shown("test_transfer.py::test_mooncake_file_gives_the_metadata_server_and_device"),
    "transport.port_range": Shown("test_pipeline.py::test_replicas_and_progress_listen_within_the_port_range"),
    "transport.pool_bytes": Seen("transport.pool_bytes=100000000", pools),
    "transport.driver_pool_bytes": Seen("transport.driver_pool_bytes=100000000", pools),
    "transport.verify": Shown("test_transfer.py::test_corrupted_byte_passes_where_checksums_are_off"),
    "transport.timeout_s": Shown("test_transfer.py::"),
    "cluster.address": Seen("cluster.address=127.0.0.1:9", joined, ("cluster.address=127.0.0.1:8",)),
    "cluster.num_gpus": Seen("cluster.num_gpus=2", own_cluster),
    "cluster.dashboard": Seen("cluster.dashboard=true", own_cluster),
    "cluster.start_timeout_s": Shown(
        "test_placement.py::test_a_replica_that_fits_nowhere_is_waited_for_visibly_until_the_deadline"
    ),
    "failures.max_attempts": Shown(REPLAY + "test_a_request_that_kills_its_replica_fails_alone"),
    "failures.stall_s": Shown("test_hangs.py::test_a_hung_encode_is_replaced_and_its_request_finishes"),
    "failures.answer_s": Shown("test_connect.py::test_the_doctor_asks_every_replica_and_a_silent_one_is_replaced"),
    "failures.timeout_s": Shown(REPLAY + "test_a_request_over_its_time_fails_and_frees_its_slots"),
    "failures.shutdown_grace_s": Shown("test_connect.py::test_sigterm_ends_a_batch_and_the_next_run_resumes"),
    "service.client_timeout_s": Shown(
        "test_service.py::test_a_dead_drivers_requests_are_cancelled_and_its_latents_are_kept"
    ),
    "service.target_wait_s": Shown(SCALER),
    "service.patience_s": Shown(SCALER),
    "service.idle_s": Shown(SCALER),
    "service.cluster_grows": Shown(SCALER),
    "service.latents_bytes": Seen("service.latents_bytes=1500", kept),
    "service.latents_expire_s": Seen("service.latents_expire_s=1e-9", kept),
    "service.folder": Shown("test_http.py::test_videos_go_to_a_url_too_and_are_freed_there"),
    "service.database": Shown("test_http_store.py::test_a_database_that_cannot_be_is_named"),
    "service.api_keys": Shown("test_http.py::test_keys_keep_tenants_apart_and_within_their_limits_and_are_not_logged"),
    "service.expires_after_s": Shown("test_http.py::test_expired_and_excess_videos_are_removed"),
    "service.max_bytes": Shown("test_http.py::test_expired_and_excess_videos_are_removed"),
    "service.max_upload_bytes": Shown("test_http.py::test_the_size_of_a_body_is_bounded_by_the_configuration"),
    "progress": Shown("test_progress.py::test_without_progress_replicas_tell_of_no_step"),
    "output.scale": Shown("test_cli.py::test_local_run_writes_a_video_that_decodes"),
    "speed": Shown("test_speed.py::test_fast_sets_what_is_fast_at_the_default_size"),
    "fused": Seen("fused=true", graph),
}  # fmt: skip


def load(case: Seen | Refused, *overrides: str) -> Config:
    conf = case.conf if isinstance(case, Seen) else "tiny_t2v"
    return load_config(CONF / f"{conf}.yaml", *case.given, *overrides)


def cases(kind: type, keys: Iterable[str] = KEYS) -> Any:
    chosen = {key: KEYS[key] for key in keys if isinstance(KEYS[key], kind)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def test_every_key_of_the_schema_has_an_entry_here() -> None:
    every = list(known_keys(Config))
    sections = {key for key in every if any(other.startswith((f"{key}.", f"{key}[")) for other in every)}
    assert set(every) - sections <= set(KEYS)
    assert set(KEYS) <= set(every)


@cases(Seen)
def test_a_change_of_the_key_shows(case: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if case.look is kept:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, after = (case.look(load(case, *changes)) for changes in ((), (case.changes,)))
    assert repr(before) != repr(after)


@cases(Refused)
def test_a_key_that_would_do_nothing_is_refused_by_name(case: Refused) -> None:
    key = case.changes.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^invalid {re.escape(key)}=.*: .*{re.escape(case.says)}"):
        load(case, case.changes)


@cases(Shown)
def test_the_test_that_shows_a_key_is_there(case: Shown) -> None:
    file, _, name = case.by.partition("::")
    key = next(key for key, entry in KEYS.items() if entry is case)
    text = (TESTS / file).read_text()
    assert f"def {name}(" in text or not name
    assert key.rpartition(".")[2] in text


OF_STAGES = [key for key in KEYS if key.startswith("stages.*.") and isinstance(KEYS[key], Seen)]


@cases(Seen, OF_STAGES)
def test_fusing_keeps_or_refuses_what_a_stage_asks_for(case: Seen) -> None:
    try:
        before, after = (load(case, *changes, "fused=true") for changes in ((), (case.changes,)))
    except ConfigError as error:
        assert "invalid fused=true: stages." in str(error)
        assert " and stages." in str(error)
        return
    assert before.stages["fused"] != after.stages["fused"]


def test_a_pipeline_of_ones_own_refuses_replicas_that_follow_the_load() -> None:
    with pytest.raises(ConfigError, match=r"^invalid stages.transformer.replicas=\{min: 1, max: 2\}: must be a number"):
        Pipeline.from_config(CONF / "tiny_t2v.yaml", f"{T}.replicas={{min: 1, max: 2}}")
