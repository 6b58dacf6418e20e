"""The `disagg-ray` command.

Exit status: 0 done, 2 what was given cannot be used, 1 it failed, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from disagg_ray.config import Config, load_config, to_yaml
from disagg_ray.environment import in_ray_job
from disagg_ray.errors import DisaggError, InputError, PlanError
from disagg_ray.output import check_output, format_of
from disagg_ray.request import TYPES, Request, resolve
from disagg_ray.version import VERSION

if TYPE_CHECKING:
    from disagg_ray.local import LocalPipeline
    from disagg_ray.pipeline import Pipeline
    from disagg_ray.profile import Profile

EPILOG = "KEY=VALUE overrides the configuration, as stages.transformer.replicas=2; `disagg-ray config` prints all keys."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name == "--version":
        print(f"disagg-ray {VERSION}")
        return 0
    if name not in COMMANDS:
        asked_for_help = name in ("-h", "--help")
        print(_usage(), file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with _terminated():
            return COMMANDS[name](arguments[1:])
    except InputError as error:
        print(f"disagg-ray: error: {error}", file=sys.stderr)
        return 2
    except DisaggError as error:
        print(f"disagg-ray: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("disagg-ray: interrupted", file=sys.stderr)
        return 130


def generate(argv: Sequence[str]) -> int:
    """Generate one video."""
    parser = _parser("generate", generate)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument("--output", required=True, help="where to write: .mp4, .gif, .npy, or a folder for png files")
    parser.add_argument("--local", action="store_true", help="run all stages in this process, without Ray")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _add_request_flags(parser)
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, *options.overrides)
    check_output(options.output, overwrite=options.overwrite, in_job=in_ray_job())
    given = {f.name: getattr(options, f.name, None) for f in fields(Request)}
    request = Request(**{k: v for k, v in given.items() if v is not None}, format=format_of(options.output))
    resolve(request, config)  # what is wrong with it should show before anything starts

    from disagg_ray.report import print_result

    with _start(config, local=options.local) as pipeline:
        result = pipeline.generate(request)
        path = result.save(options.output, overwrite=options.overwrite)
        print_result(result, pipeline.weights, pipeline.pools)
        print(f"wrote {path}")
    return 0


@contextmanager
def _start(config: Config, *, local: bool) -> Iterator[LocalPipeline | Pipeline]:
    """Start the pipeline, and end it whatever happens."""
    if local:
        from disagg_ray.local import LocalPipeline

        with LocalPipeline(config) as pipeline:
            yield pipeline
        return
    from disagg_ray.pipeline import Pipeline
    from disagg_ray.placement import Cluster

    with closing(Cluster(config)), _terminated(), Pipeline(config) as split:  # Ray took the handler when it started
        yield split


def show_config(argv: Sequence[str]) -> int:
    """Print the resolved configuration."""
    parser = _parser("config", show_config)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    options = parser.parse_intermixed_args(argv)
    print(to_yaml(load_config(options.config, *options.overrides)), end="")
    return 0


def make_checkpoint(argv: Sequence[str]) -> int:
    """Write a checkpoint of a known shape with seeded random weights."""
    parser = _Parser(prog="disagg-ray make-checkpoint", description=make_checkpoint.__doc__)
    parser.add_argument("shape", help="as wan2.1-t2v-1.3b or tiny-t2v")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    options = parser.parse_args(argv)
    from disagg_ray.models import maker

    try:
        path = maker.make_checkpoint(
            options.shape, options.folder, seed=options.seed, dtype=options.dtype, device=options.device
        )
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {path}")
    return 0


def profile(argv: Sequence[str]) -> int:
    """Measure the stages on this machine and keep that in a file, for `plan`."""
    parser = _parser("profile", profile)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument("--output", type=Path, default=Path("profile.json"), help="file to write")
    parser.add_argument(
        "--sizes", help="HEIGHTxWIDTHxFRAMES, comma separated; by default the configured one and half as long"
    )
    parser.add_argument("--steps", default="2,4", help="denoising steps, comma separated")
    parser.add_argument("--format", default="mp4", help="of the file whose encoding is measured: mp4, gif, png or npy")
    parser.add_argument("--repeats", type=int, default=2, help="times each is measured, after a first time that is not")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, *options.overrides)
    requests = _requests_to_profile(config, options.sizes, options.steps, options.format)
    if options.repeats < 1:
        raise PlanError(f"repeats: {options.repeats} is not possible; write 1 or more")
    for request in requests:
        resolve(request, config)

    from disagg_ray.profile import write_profile
    from disagg_ray.profiling import measure_profile
    from disagg_ray.report import print_profile

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
    parser = _parser("plan", plan)
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument(
        "--profile", required=True, help="FILE, or KIND=FILE,KIND=FILE, as `disagg-ray profile` wrote them"
    )
    parser.add_argument(
        "--gpus", required=True, help="COUNTxKIND, comma separated, as 8xH200,4xL40S; KIND:GB says the memory"
    )
    parser.add_argument(
        "--speed", default="", help="KIND=FACTOR, comma separated: of kinds without a profile, to the profile's"
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
    config = load_config(options.config, *options.overrides)
    asked = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    request, _ = resolve(
        Request("a cat", **{name: getattr(options, name) for name in asked}),
        replace(config, model=replace(config.model, task="t2v")),
    )
    if options.requests is not None and options.requests < 1:
        raise PlanError(f"requests: {options.requests} is not possible; write 1 or more")

    from disagg_ray import plan as planning
    from disagg_ray.layouts import to_settings, to_yaml
    from disagg_ray.profile import Load
    from disagg_ray.report import print_plan

    hardware = planning.equip(
        planning.parse_gpus(options.gpus), _read_profiles(options.profile), _speeds(options.speed)
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
        options.output.write_text(f"base: {Path(options.config).absolute()}\n{text}")
    return 0


def _read_profiles(text: str) -> dict[str, Profile]:
    """Return profiles by kind; one given without a kind is of the kind it was measured on."""
    from disagg_ray.profile import read_profile

    found = {}
    for part in text.split(","):
        kind, equals, path = part.partition("=")
        profile = read_profile(Path(path if equals else part))
        found[kind if equals else profile.kind] = profile
    return found


def _speeds(text: str) -> dict[str, float]:
    try:
        return {kind: float(factor) for kind, _, factor in (part.partition("=") for part in text.split(",") if part)}
    except ValueError as error:
        raise PlanError(f"speed: {text!r} is not KIND=FACTOR, as L40S=0.35") from error


COMMANDS = {
    "generate": generate,
    "config": show_config,
    "make-checkpoint": make_checkpoint,
    "profile": profile,
    "plan": plan,
}


def _usage() -> str:
    lines = [f"  {name:<16} {inspect.getdoc(command)}" for name, command in COMMANDS.items()]
    return "usage: disagg-ray COMMAND ...\n\n" + "\n".join(lines) + "\n\n`disagg-ray COMMAND --help` says more."


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as everything else is reported: in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser(name: str, command: Any) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"disagg-ray {name}", description=command.__doc__, epilog=EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides, anywhere")
    return parser


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add a kebab-case flag for every field of Request but `format`, which the output's suffix decides."""
    docs = field_docs(Request)
    for f in fields(Request):
        if f.name != "format":
            kind = TYPES.get(f.name, (str,))[-1]
            parser.add_argument(f"--{f.name.replace('_', '-')}", type=kind, metavar=kind.__name__, help=docs[f.name])


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that every `with` closes what it holds."""

    def leave(signum: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
