"""The commands that find the best layout: profile and plan."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagg_ray.cli.arguments import config_parser, overrides_of
from disagg_ray.config.builtin import anywhere
from disagg_ray.config.load import load_config
from disagg_ray.config.parallel import ParallelConfig
from disagg_ray.config.rules import enforce
from disagg_ray.config.schema import Config
from disagg_ray.environment import expand_home
from disagg_ray.errors import InputError, PlanError, RequestError
from disagg_ray.inputs import blank_inputs
from disagg_ray.media.output import write_text
from disagg_ray.media.places import check_file
from disagg_ray.request import TYPES, Request, ResolvedRequest, resolve

if TYPE_CHECKING:
    from disagg_ray.planning.predict import Hardware
    from disagg_ray.planning.profile import Profile

DEGREES = ("cfg", "ulysses", "ring", "rows")
"""Numbers of a gang's ranks, in the order of `ParallelConfig`."""
SHAPE = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
"""Fields of a request that decide its work."""


def profile(argv: Sequence[str]) -> int:
    """Measure the stages on this machine and write a profile for `plan`."""
    parser = config_parser("profile", profile, required=True)
    parser.add_argument("--output", type=expand_home, default=Path("profile.json"), help="file to write")
    parser.add_argument(
        "--sizes",
        help="HEIGHTxWIDTHxFRAMES,... of images HEIGHTxWIDTH; default: as configured, and half its frames",
    )
    parser.add_argument("--steps", default="2,4", help="numbers of denoising steps to measure, comma separated")
    parser.add_argument(
        "--format",
        help="format whose encoding is measured; default mp4, of images png",
    )
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each, after one warm-up")
    parser.add_argument(
        "--parallel",
        default="",
        metavar="WAYS",
        help="also ranks of denoiser or decoder: cfg=2/ulysses=2/rows=2",
    )
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, *overrides_of(options))
    requests = _requests_to_profile(config, options.sizes, options.steps, options.format)
    if options.repeats < 1:
        raise PlanError(f"invalid --repeats={options.repeats}: must be at least 1")
    for request in requests:
        resolve(request, config)
    gangs = _parse_parallel(config, options.parallel)
    check_file(options.output, "output")

    from disagg_ray.planning.profile import write_profile
    from disagg_ray.planning.profiling import measure_profile
    from disagg_ray.report.tables import print_profile

    measured = measure_profile(config, requests, options.repeats, gangs)
    write_profile(measured, options.output)
    print_profile(measured)
    print(f"wrote {options.output}")
    return 0


def _requests_to_profile(config: Config, sizes: str | None, steps: str, file_format: str | None) -> list[Request]:
    defaults, step = config.defaults, config.model.traits.frames_step
    own, names, example = f"{defaults.height}x{defaults.width}", list(SHAPE[:2]), "1024x1024,512x512"
    if step is not None:
        names, example = list(SHAPE[:3]), "480x832x81,480x832x41"
        half = step * (defaults.num_frames // (2 * step)) + 1
        own = ",".join(f"{own}x{number}" for number in sorted({half, defaults.num_frames}))
    try:
        shapes = [dict(zip(names, map(int, size.split("x")), strict=True)) for size in (sizes or own).split(",")]
    except ValueError as error:
        raise PlanError(f"invalid --sizes={sizes}: write {example}") from error
    try:
        counts = [int(number) for number in steps.split(",")]
    except ValueError as error:
        raise PlanError(f"invalid --steps={steps}: write 2,4") from error
    return [
        _example(config, **shape, num_inference_steps=count, seed=0, format=file_format)
        for shape in shapes for count in counts
    ]  # fmt: skip


def _example(config: Config, **fields: Any) -> Request:
    """Return a request that is as much work as any of its shape."""
    return Request("a cat walks through tall grass", **blank_inputs(config), **fields)


def _parse_parallel(config: Config, text: str) -> list[ParallelConfig]:
    """Return the gangs that the configuration and `--parallel` ask for, each once."""
    found = [stage.parallel for stage in config.stages.values()]
    for way in filter(None, text.split("/")):
        try:
            numbers = {name.strip(): int(number) for name, number in (pair.split("=") for pair in way.split(","))}
        except ValueError:
            numbers = {}
        if not numbers or set(numbers) - set(DEGREES):
            raise PlanError(f"invalid --parallel={text}: write cfg=2/ulysses=2/cfg=2,ulysses=2/rows=2")
        cfg, ulysses, ring, rows = (numbers.get(name, 1) for name in DEGREES)
        found.append(ParallelConfig(cfg, ulysses, ring, rows))
    return list(dict.fromkeys(parallel for parallel in found if parallel.is_gang))


def plan(argv: Sequence[str]) -> int:
    """Predict fused and split layouts on the given GPUs, and print the best one's YAML."""
    parser = config_parser("plan", plan, required=True)
    parser.add_argument("--profile", required=True, help="FILE, or KIND=FILE,..., written by `disagg-ray profile`")
    parser.add_argument("--gpus", required=True, help="COUNTxKIND,... such as 8xH200,4xL40S; KIND:GB sets the VRAM")
    parser.add_argument("--factors", default="", help="KIND=FACTOR,... relative speed of kinds without a profile")
    parser.add_argument(
        "--aim",
        choices=("throughput", "latency"),
        default="throughput",
        help="throughput (videos or images a minute, the default) or latency (seconds of one)",
    )
    parser.add_argument("--requests", type=int, help="batch size whose makespan to minimise; default: throughput")
    parser.add_argument("--output", type=expand_home, help="file to also write the YAML to, based on --config")
    for name in SHAPE:
        kind = TYPES[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar=kind.__name__, help="of a request; default: the configured one")
    options = parser.parse_intermixed_args(argv)
    if options.output is not None:
        check_file(options.output, "output")
    config = load_config(options.config, *overrides_of(options))
    given = {name: getattr(options, name) for name in SHAPE}
    request, _ = resolve(_example(config, **given), config)
    if options.requests is not None and options.requests < 1:
        raise PlanError(f"invalid --requests={options.requests}: must be at least 1")
    if options.requests is not None and options.aim == "latency":
        raise PlanError(f"invalid --requests={options.requests}: must be left out with --aim latency, of one request")

    _plan(config, request, options)
    return 0


def _plan(config: Config, request: ResolvedRequest, options: Namespace) -> None:
    from disagg_ray.planning import plan as planning
    from disagg_ray.planning.layouts import to_settings, to_yaml
    from disagg_ray.planning.profile import Load
    from disagg_ray.report.tables import print_plan

    gpus, profiles = planning.parse_gpus(options.gpus), _read_profiles(options.profile, config.speed)
    hardware = planning.equip(gpus, profiles, _parse_factors(options.factors))
    load = Load(request.height, request.width, request.num_frames, request.num_passes)
    gangs, notes = _choose_gangs(config, request, hardware)
    made = planning.make_plan(hardware, load, options.requests, gangs, options.aim)
    if set(made.stages.order) != set(config.stages):
        raise PlanError(
            f"profile: its stages are {', '.join(made.stages.order)}, those of the configuration "
            f"{', '.join(config.stages)}; run `disagg-ray profile` with this configuration"
        )
    for measured in profiles.values():
        if measured.model != (model := config.model.path):
            notes.append(
                f"the profile is of {measured.model}, and model.path is {model}: trust it if that is one model"
            )
    print_plan(made, options.requests)
    print("\n".join([planning.explain(made), *planning.footnotes(made), *notes]))
    base = {name: stage.parallel for name, stage in config.stages.items()}
    text = to_yaml(to_settings(made.best.layout, made.stages, base))
    print("\n" + text, end="")
    if options.output is not None:
        write_text(options.output, f"base: {anywhere(options.config)}\n{text}")


def _choose_gangs(
    config: Config, request: ResolvedRequest, hardware: Sequence[Hardware]
) -> tuple[list[ParallelConfig], list[str]]:
    """Return the gangs to plan with, and why others are left out."""
    from disagg_ray.planning.layouts import CPU
    from disagg_ray.planning.parallel import candidates, choose, row_candidates

    def why_not(parallel: ParallelConfig) -> str:
        stages = {
            name: replace(stage, parallel=parallel, groups={}, num_gpus=1.0 if stage.torch_device == "cuda" else 0.0)
            if ("decode" if parallel.rows > 1 else "denoise") in stage.blocks else stage
            for name, stage in config.stages.items()
        }  # fmt: skip
        try:
            split = replace(config, stages=stages, share_gpu=[])
            enforce(split.size_rules(request.height, request.width, request.num_frames, 1), RequestError)
        except InputError as error:
            return str(error)
        return ""

    measured = [gang.parallel for gpus in hardware for gang in gpus.profile.gangs]
    most = max((gpus.count for gpus in hardware if gpus.kind != CPU), default=0)
    heads = {stage.num_heads for gpus in hardware for stage in gpus.profile.stages if stage.denoises}
    known = [p for p in measured if (request.guided or p.cfg == 1) and p.size <= max(gpus.count for gpus in hardware)]
    estimated = [*candidates(most, max(heads, default=0), guided=request.guided), *row_candidates(most)]
    found = dict.fromkeys([*estimated, *known])
    chosen, notes = choose(found, why_not)
    if not request.guided and most > 1:
        notes.append("cfg 2 is left out: a request without guidance would leave half of such a gang idle")
    return chosen, notes


def _read_profiles(text: str, speed: str) -> dict[str, Profile]:
    """Return profiles by kind of GPU; one given without a kind is for the kind that it was measured on."""
    from disagg_ray.planning.profile import check_profile, read_profile

    found = {}
    for part in filter(None, text.split(",")):
        kind, equals, path = part.partition("=")
        profile = read_profile(expand_home(path if equals else part))
        check_profile(profile, kind if equals else profile.kind, speed)
        found[profile.kind] = profile
    return found


def _parse_factors(text: str) -> dict[str, float]:
    try:
        return {kind: float(factor) for kind, _, factor in (part.partition("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise PlanError(f"invalid --factors={text}: write KIND=FACTOR, such as L40S=0.35") from error
