"""The commands that say which layout pays: profile and plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_ray.cli.arguments import config_parser, overrides_of
from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.errors import PlanError
from disagg_ray.media.output import check_file, write_text
from disagg_ray.request import Request, resolve

if TYPE_CHECKING:
    from disagg_ray.planning.profile import Profile


def profile(argv: Sequence[str]) -> int:
    """Measure the stages on this machine and keep that in a file, for `plan`."""
    parser = config_parser("profile", profile)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument("--output", type=Path, default=Path("profile.json"), help="file to write")
    parser.add_argument(
        "--sizes", help="HEIGHTxWIDTHxFRAMES, comma separated; by default the configured one and half as long"
    )
    parser.add_argument("--steps", default="2,4", help="denoising steps, comma separated")
    parser.add_argument("--format", default="mp4", help="of the file whose encoding is measured: mp4, gif, png or npy")
    parser.add_argument("--repeats", type=int, default=2, help="times each is measured, after a first time that is not")
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
        raise PlanError(
            f"sizes: {chosen!r} with steps {steps!r}: write them as 480x832x81,480x832x41 and 2,4"
        ) from error


def plan(argv: Sequence[str]) -> int:
    """Predict fused and every sensible split on GPUs that you name, and print the best one's YAML."""
    parser = config_parser("plan", plan)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument(
        "--profile", required=True, help="FILE, or KIND=FILE,KIND=FILE, as `disagg-ray profile` wrote them"
    )
    parser.add_argument(
        "--gpus", required=True, help="COUNTxKIND, comma separated, as 8xH200,4xL40S; KIND:GB says the memory"
    )
    parser.add_argument(
        "--factors",
        default="",
        help="KIND=FACTOR, comma separated: the speed of kinds without a profile, to the profile's",
    )
    parser.add_argument("--requests", type=int, help="that come at once and are to be done soonest; else: steady state")
    parser.add_argument("--output", type=Path, help="where to write the YAML too, building on --config")
    for name, kind in (
        ("height", int),
        ("width", int),
        ("num-frames", int),
        ("num-inference-steps", int),
        ("guidance-scale", float),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__, help="of a request; else the configured one")
    options = parser.parse_intermixed_args(argv)
    if options.output is not None:
        check_file(options.output, "output")
    config = load_config(options.config, *overrides_of(options))
    asked = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    request, _ = resolve(
        Request("a cat", **{name: getattr(options, name) for name in asked}),
        replace(config, model=replace(config.model, task="t2v")),
    )
    if options.requests is not None and options.requests < 1:
        raise PlanError(f"invalid --requests={options.requests}: must be at least 1")

    from disagg_ray.planning import plan as planning
    from disagg_ray.planning.layouts import to_settings, to_yaml
    from disagg_ray.planning.profile import Load
    from disagg_ray.report.tables import print_plan

    hardware = planning.equip(
        planning.parse_gpus(options.gpus), _read_profiles(options.profile, config.speed), _factors(options.factors)
    )
    load = Load(
        request.height, request.width, request.num_frames, request.num_inference_steps * (2 if request.guided else 1)
    )
    made = planning.make_plan(hardware, load, options.requests)
    if set(made.stages.order) != set(config.stages):
        raise PlanError(
            f"profile: it has the stages {', '.join(made.stages.order)}, "
            f"and the configuration {', '.join(config.stages)}; measure this one"
        )
    print_plan(made, options.requests)
    print(planning.explain(made))
    text = to_yaml(to_settings(made.best.layout, made.stages))
    print("\n" + text, end="")
    if options.output is not None:
        write_text(options.output, f"base: {Path(options.config).absolute()}\n{text}")
    return 0


def _read_profiles(text: str, speed: str) -> dict[str, Profile]:
    """Return profiles by kind; one given without a kind is of the kind it was measured on."""
    from disagg_ray.planning.profile import check_profile, read_profile

    found = {}
    for part in text.split(","):
        kind, equals, path = part.partition("=")
        profile = read_profile(Path(path if equals else part))
        check_profile(profile, kind if equals else profile.kind, speed)
        found[profile.kind] = profile
    return found


def _factors(text: str) -> dict[str, float]:
    try:
        return {kind: float(factor) for kind, _, factor in (part.partition("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise PlanError(f"--factors: {text!r} is not KIND=FACTOR, as L40S=0.35") from error
