"""The commands that find the best layout: profile and plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_ray.cli.arguments import config_parser, overrides_of
from disagg_ray.config.builtin import anywhere
from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import PlanError
from disagg_ray.media.output import check_file, write_text
from disagg_ray.request import IMAGES_OF, TYPES, Request, resolve

if TYPE_CHECKING:
    from disagg_ray.planning.profile import Profile

SHAPE = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
"""Fields of a request that decide its work."""


def profile(argv: Sequence[str]) -> int:
    """Measure the stages on this machine and write a profile for `plan`."""
    parser = config_parser("profile", profile, required=True)
    parser.add_argument("--output", type=Path, default=Path("profile.json"), help="file to write")
    parser.add_argument("--sizes", help="HEIGHTxWIDTHxFRAMES,... default: the configured one, and half its frames")
    parser.add_argument("--steps", default="2,4", help="numbers of denoising steps to measure, comma separated")
    parser.add_argument("--format", default="mp4", help="file format whose encoding is measured: mp4, gif, png or npy")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each, after one warm-up")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, *overrides_of(options))
    requests = _requests_to_profile(config, options.sizes, options.steps, options.format)
    if options.repeats < 1:
        raise PlanError(f"invalid --repeats={options.repeats}: must be at least 1")
    for request in requests:
        resolve(request, config)
    check_file(options.output, "output")

    from disagg_ray.planning.profile import write_profile
    from disagg_ray.planning.profiling import measure_profile
    from disagg_ray.report.tables import print_profile

    measured = measure_profile(config, requests, options.repeats)
    write_profile(measured, options.output)
    print_profile(measured)
    print(f"wrote {options.output}")
    return 0


def _requests_to_profile(config: Config, sizes: str | None, steps: str, file_format: str) -> list[Request]:
    defaults = config.defaults
    half = 4 * (defaults.num_frames // 8) + 1
    chosen = sizes or ",".join(f"{defaults.height}x{defaults.width}x{n}" for n in {half, defaults.num_frames})
    try:
        counts = [int(number) for number in steps.split(",")]
        numbers = [[int(number) for number in size.split("x")] for size in chosen.split(",")]
        return [
            Request("a cat walks through tall grass", height=height, width=width, num_frames=num_frames,
                    num_inference_steps=count, seed=0, format=file_format)
            for height, width, num_frames in numbers for count in counts
        ]  # fmt: skip
    except ValueError as error:
        raise PlanError(f"invalid --sizes={chosen} or --steps={steps}: write 480x832x81,480x832x41 and 2,4") from error


def plan(argv: Sequence[str]) -> int:
    """Predict fused and split layouts on the given GPUs, and print the best one's YAML."""
    parser = config_parser("plan", plan, required=True)
    parser.add_argument("--profile", required=True, help="FILE, or KIND=FILE,..., written by `disagg-ray profile`")
    parser.add_argument("--gpus", required=True, help="COUNTxKIND,... such as 8xH200,4xL40S; KIND:GB sets the VRAM")
    parser.add_argument("--factors", default="", help="KIND=FACTOR,... relative speed of kinds without a profile")
    parser.add_argument("--requests", type=int, help="batch size whose makespan to minimise; default: throughput")
    parser.add_argument("--output", type=Path, help="file to also write the YAML to, based on --config")
    for name in SHAPE:
        kind = TYPES[name]
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar=kind.__name__, help="of a request; default: the configured one")
    options = parser.parse_intermixed_args(argv)
    if options.output is not None:
        check_file(options.output, "output")
    config = load_config(options.config, *overrides_of(options))
    given = {name: getattr(options, name) for name in SHAPE}
    if IMAGES_OF[config.model.task]:  # which do not change a plan
        config = replace(config, model=replace(config.model, task="t2v"))
    request, _ = resolve(Request("a cat", **given), config)
    if options.requests is not None and options.requests < 1:
        raise PlanError(f"invalid --requests={options.requests}: must be at least 1")

    from disagg_ray.planning import plan as planning
    from disagg_ray.planning.layouts import to_settings, to_yaml
    from disagg_ray.planning.profile import Load
    from disagg_ray.report.tables import print_plan

    gpus, profiles = planning.parse_gpus(options.gpus), _read_profiles(options.profile, config.speed)
    hardware = planning.equip(gpus, profiles, _parse_factors(options.factors))
    passes = request.num_inference_steps * (2 if request.guided else 1)
    load = Load(request.height, request.width, request.num_frames, passes)
    made = planning.make_plan(hardware, load, options.requests)
    if set(made.stages.order) != set(config.stages):
        raise PlanError(
            f"profile: its stages are {', '.join(made.stages.order)}, those of the configuration "
            f"{', '.join(config.stages)}; run `disagg-ray profile` with this configuration"
        )
    print_plan(made, options.requests)
    print(planning.explain(made))
    text = to_yaml(to_settings(made.best.layout, made.stages))
    print("\n" + text, end="")
    if options.output is not None:
        write_text(options.output, f"base: {anywhere(options.config)}\n{text}")
    return 0


def _read_profiles(text: str, speed: str) -> dict[str, Profile]:
    """Return profiles by kind of GPU; one given without a kind is for the kind that it was measured on."""
    from disagg_ray.planning.profile import check_profile, read_profile

    found = {}
    for part in text.split(","):
        kind, equals, path = part.partition("=")
        profile = read_profile(Path(path if equals else part))
        check_profile(profile, kind if equals else profile.kind, speed)
        found[profile.kind] = profile
    return found


def _parse_factors(text: str) -> dict[str, float]:
    try:
        return {kind: float(factor) for kind, _, factor in (part.partition("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise PlanError(f"invalid --factors={text}: write KIND=FACTOR, such as L40S=0.35") from error
