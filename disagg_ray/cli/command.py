"""The `disagg-ray` command.

Exit status: 0 done, 1 failed, 2 invalid input, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from disagg_ray.cli import console, logs
from disagg_ray.cli.arguments import Parser, config_parser, overrides_of
from disagg_ray.cli.generate import generate
from disagg_ray.cli.plan import plan, profile
from disagg_ray.cli.serve import keys, serve
from disagg_ray.cli.service import down, ls, scale, up
from disagg_ray.config.builtin import BUILTIN, list_builtin
from disagg_ray.config.docs import to_markdown
from disagg_ray.config.load import load_config, to_yaml
from disagg_ray.driver.signals import exiting_on_sigterm
from disagg_ray.environment import expand_home
from disagg_ray.errors import DisaggError, InputError
from disagg_ray.media.places import check_folder, local_path
from disagg_ray.text import did_you_mean, shown
from disagg_ray.version import VERSION


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    console.set_up()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        status = _run(name, arguments[1:])
    elif name in ("-h", "--help"):
        print(_usage())
        status = 0
    elif name == "--version":
        print(f"disagg-ray {VERSION}")
        status = 0
    else:
        near = did_you_mean(name, COMMANDS) or "; `disagg-ray --help` lists the commands"
        console.fail("error", f"COMMAND: no command {shown(name)}{near}")
        status = 2
    return status if console.flush() else max(status, 1)


def _run(name: str, arguments: Sequence[str]) -> int:
    logs.set_up()
    try:
        with exiting_on_sigterm():
            return COMMANDS[name](arguments)
    except InputError as error:
        console.fail("error", error)
        return 2
    except DisaggError as error:
        console.fail("failed", error)
        return 1
    except KeyboardInterrupt:
        print("disagg-ray: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - the end of the process, which reports it
        console.crash(error)
        return 1


def show_config(argv: Sequence[str]) -> int:
    """Print the resolved configuration, with --docs the reference of all keys, or with --list what comes along."""
    parser = config_parser("config", show_config)
    parser.add_argument("--docs", action="store_true", help="print every key with its default and meaning, as Markdown")
    parser.add_argument("--list", action="store_true", help="list the configurations that come with the package")
    options = parser.parse_intermixed_args(argv)
    if options.docs + options.list + (options.config is not None) != 1:
        raise InputError("--config: give either a YAML file to resolve, --docs for all keys, or --list")
    if options.list:
        for name, about in list_builtin().items():
            print(f"{BUILTIN}{name:<26} {about}")
        return 0
    if options.docs:
        print(to_markdown(), end="")
        return 0
    overrides = overrides_of(options)
    plain = load_config(options.config, *overrides, "speed=exact")
    print(to_yaml(load_config(options.config, *overrides), plain), end="")
    return 0


def make_checkpoint(argv: Sequence[str]) -> int:
    """Write a checkpoint of a known shape with seeded random weights."""
    parser = Parser(prog="disagg-ray make-checkpoint", description=make_checkpoint.__doc__)
    parser.add_argument("shape", help="name of the shape, such as tiny-t2v")
    parser.add_argument("folder", type=expand_home, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="device that draws the weights")
    options = parser.parse_args(argv)
    check_folder(options.folder, "folder")
    from disagg_ray.models import random

    try:
        path = random.make_checkpoint(
            options.shape, options.folder, seed=options.seed, dtype=options.dtype, device=options.device
        )
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {path}")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Check this machine, the cluster's nodes and the routes between them, or a service."""
    parser = config_parser("doctor", doctor)
    parser.add_argument("--connect", metavar="NAME", help="check this service instead, by one small request")
    parser.add_argument("--address", help="Ray cluster to join, as cluster.address does")
    parser.add_argument("--local", action="store_true", help="check this machine only, without Ray")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--output", help="also check that a file can be written there")
    options = parser.parse_intermixed_args(argv)
    overrides = overrides_of(options)
    if overrides and not options.config:
        raise InputError(f"--config: required to override {overrides[0]!r}; give a YAML file")
    if options.connect and (options.config or options.local):
        raise InputError("--connect: not allowed with --config or --local: a service has its own configuration")
    config = load_config(options.config, *overrides) if options.config else None
    from disagg_ray.doctor import check_place, examine, examine_service, exit_status, print_checks, to_json

    if options.connect:
        checks = examine_service(options.connect, options.address)
    else:
        checks = examine(config, options.address, local=options.local)
    if options.output is not None:
        checks.append(check_place(options.output))
    print(to_json(checks)) if options.json else print_checks(checks)
    return exit_status(checks)


def report(argv: Sequence[str]) -> int:
    """Report where a finished run's time went: tables, a timeline, a trace and a page with what was made."""
    parser = Parser(prog="disagg-ray report", description=report.__doc__)
    parser.add_argument("folder", metavar="OUT", help="the --output-dir of the run")
    parser.add_argument("--output", metavar="FOLDER", help="folder to write to; default: OUT")
    options = parser.parse_args(argv)
    if options.output is not None:
        check_folder(options.output, "output")
    from disagg_ray.report.tables import write_report

    for path in write_report(local_path(options.folder), local_path(options.output or options.folder)):
        print(f"wrote {path}")
    return 0


COMMANDS = {
    "generate": generate, "report": report, "up": up, "ls": ls, "scale": scale, "down": down, "serve": serve,
    "keys": keys, "config": show_config,
    "make-checkpoint": make_checkpoint, "doctor": doctor, "profile": profile, "plan": plan,
}  # fmt: skip


def _usage() -> str:
    lines = [f"  {name:<16} {inspect.getdoc(command)}" for name, command in COMMANDS.items()]
    return "usage: disagg-ray COMMAND ...\n\n" + "\n".join(lines) + "\n\n`disagg-ray COMMAND --help` lists the flags."


if __name__ == "__main__":
    sys.exit(main())
