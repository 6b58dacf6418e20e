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
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from disagg_ray.config import Config, load_config, to_yaml
from disagg_ray.environment import in_ray_job
from disagg_ray.errors import DisaggError, InputError
from disagg_ray.output import check_output, format_of
from disagg_ray.request import TYPES, Request, resolve
from disagg_ray.version import VERSION

if TYPE_CHECKING:
    from disagg_ray.connection import Connection
    from disagg_ray.local import LocalPipeline
    from disagg_ray.pipeline import Pipeline

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
    parser.add_argument("--config", help="YAML file of the model and its deployment")
    parser.add_argument("--connect", metavar="NAME", help="use the pipeline that `disagg-ray up NAME` put up")
    parser.add_argument("--output", required=True, help="where to write: .mp4, .gif, .npy, or a folder for png files")
    parser.add_argument("--local", action="store_true", help="run all stages in this process, without Ray")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    _add_request_flags(parser)
    options = parser.parse_intermixed_args(argv)
    _check_source(options)
    check_output(options.output, overwrite=options.overwrite, in_job=in_ray_job())
    given = {f.name: getattr(options, f.name, None) for f in fields(Request)}
    request = Request(**{k: v for k, v in given.items() if v is not None}, format=format_of(options.output))
    if options.config is not None:
        config = load_config(options.config, *options.overrides)
        resolve(request, config)  # what is wrong with it should show before anything starts

    from disagg_ray.report import print_result

    with _connect(options.connect) if options.connect else _start(config, local=options.local) as pipeline:
        result = pipeline.generate(request)
        path = result.save(options.output, overwrite=options.overwrite)
        print_result(result, pipeline.weights, pipeline.pools)
        print(f"wrote {path}")
    return 0


def _check_source(options: argparse.Namespace) -> None:
    if (options.config is None) == (options.connect is None):
        raise InputError("--config: give it, or the NAME of a standing pipeline as --connect, and not both")
    if options.connect is not None and (options.overrides or options.local):
        given = options.overrides[0] if options.overrides else "--local"
        raise InputError(f"--connect: {given} has no effect on a pipeline that stands; leave it out, or use `up`")


@contextmanager
def _connect(name: str) -> Iterator[Connection]:
    from disagg_ray.connection import Connection

    with _joined(None), Connection(name) as connection:
        yield connection


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


def doctor(argv: Sequence[str]) -> int:
    """Check this machine, the cluster's nodes and every way between them."""
    parser = _parser("doctor", doctor)
    parser.add_argument("--config", help="YAML file of the model and its deployment, to check against it")
    parser.add_argument("--address", help="Ray cluster to join, as cluster.address")
    parser.add_argument("--local", action="store_true", help="check this machine only, without Ray")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_intermixed_args(argv)
    if options.overrides and not options.config:
        raise InputError(f"--config: not given, so {options.overrides[0]!r} has nothing to override; give a YAML file")
    config = load_config(options.config, *options.overrides) if options.config else None
    from disagg_ray.doctor import examine, exit_status, print_checks, to_json

    checks = examine(config, options.address, local=options.local)
    print(to_json(checks)) if options.json else print_checks(checks)
    return exit_status(checks)


def up(argv: Sequence[str]) -> int:
    """Put a pipeline up that stays, for many drivers; one that stands becomes what is given, replica by replica."""
    parser = _Parser(prog="disagg-ray up", description=up.__doc__, epilog=EPILOG)
    parser.add_argument("name", metavar="NAME", help="what drivers will call it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="configuration overrides, anywhere")
    parser.add_argument("--config", required=True, help="YAML file of the model and its deployment")
    parser.add_argument("--only", metavar="STAGE", help="start this stage; the last one makes the pipeline ready")
    parser.add_argument("--here", action="store_true", help="with --only: on this machine")
    options = parser.parse_intermixed_args(argv)
    if options.here and options.only is None:
        raise InputError("--here: it goes with --only STAGE; give both, or neither")
    config = load_config(options.config, *options.overrides)
    with _joined(config.cluster.address):
        from disagg_ray import stand

        if options.only is not None:
            snapshot = stand.up_stage(options.name, options.only, config, here=options.here)
        else:
            snapshot = stand.up(options.name, config)
    if snapshot is not None:
        stages = ", ".join(f"{state.stage} {state.ready}" for state in snapshot.stages)
        print(f"{snapshot.name} is {snapshot.state}: {stages}")
    return 0


def show_standing(argv: Sequence[str]) -> int:
    """List the pipelines that stand."""
    parser = _Parser(prog="disagg-ray ls", description=show_standing.__doc__)
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(argv)
    with _joined(None):
        from disagg_ray import stand
        from disagg_ray.report import print_standing, standing_to_json

        snapshots = stand.list_all()
    if options.json:
        print(standing_to_json(snapshots))
    else:
        print_standing(snapshots)
    return 0


def down(argv: Sequence[str]) -> int:
    """Take a standing pipeline down."""
    parser = _Parser(prog="disagg-ray down", description=down.__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--drain", action="store_true", help="let what runs finish first")
    parser.add_argument("--grace", type=float, default=3600.0, metavar="SECONDS", help="most that --drain waits")
    options = parser.parse_args(argv)
    with _joined(None):
        from disagg_ray import stand

        stand.down(options.name, options.grace if options.drain else 0.0)
    print(f"{options.name} is down")
    return 0


def scale(argv: Sequence[str]) -> int:
    """Change how many replicas a stage of a standing pipeline has."""
    parser = _Parser(prog="disagg-ray scale", description=scale.__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("stages", nargs="+", metavar="STAGE=NUMBER", help="as transformer=4")
    options = parser.parse_args(argv)
    asked = [_parse_scale(text) for text in options.stages]
    with _joined(None):
        from disagg_ray import stand

        for stage, number in asked:
            stand.scale(options.name, stage, number)
            print(f"{options.name}: {stage} gets {number} replicas")
    return 0


def _parse_scale(text: str) -> tuple[str, int]:
    stage, _, number = text.partition("=")
    if not stage or not number.isdecimal() or int(number) < 1:
        raise InputError(f"STAGE=NUMBER: {text!r} is not possible; write a stage and 1 or more, as transformer=4")
    return stage, int(number)


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Join the cluster that is there."""
    from disagg_ray.placement import join

    join(address)
    with _terminated():  # Ray took the handler when it joined
        yield


COMMANDS = {
    "generate": generate, "up": up, "ls": show_standing, "scale": scale, "down": down, "config": show_config,
    "make-checkpoint": make_checkpoint, "doctor": doctor,
}  # fmt: skip


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
