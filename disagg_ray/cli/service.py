"""The commands about services: up, ls, scale, down."""

from __future__ import annotations

from collections.abc import Sequence

from disagg_ray.cli.arguments import CONFIG, EPILOG, Parser, add_overrides, overrides_of
from disagg_ray.config.deployment import check_joining
from disagg_ray.config.load import load_config
from disagg_ray.config.rules import MOST_S
from disagg_ray.errors import InputError
from disagg_ray.models.preflight import check_model
from disagg_ray.text import shown


def up(argv: Sequence[str]) -> int:
    """Deploy a service for many clients, or change a running one to this configuration, replica by replica."""
    parser = Parser(prog="disagg-ray up", description=up.__doc__, epilog=EPILOG)
    parser.add_argument("name", metavar="NAME", help="name that clients connect to")
    add_overrides(parser)
    parser.add_argument("--config", required=True, help=CONFIG)
    parser.add_argument("--only", metavar="STAGE", help="start this stage; the service is ready once all were started")
    parser.add_argument("--here", action="store_true", help="with --only: start it on this machine")
    options = parser.parse_intermixed_args(argv)
    if options.here and options.only is None:
        raise InputError("--here: requires --only STAGE")
    config = load_config(options.config, *overrides_of(options))
    check_joining(config.cluster, config.cluster.address or "this machine")
    check_model(config, whole=False)
    _join_for(options.name, config.cluster.address)
    from disagg_ray.service import lifecycle

    if options.only is not None:
        snapshot = lifecycle.up_stage(options.name, options.only, config, here=options.here)
    else:
        snapshot = lifecycle.up(options.name, config)
    if snapshot is not None:
        stages = ", ".join(f"{state.stage} {state.ready}" for state in snapshot.stages)
        print(f"{snapshot.name} is {snapshot.state}: {stages}")
    return 0


def ls(argv: Sequence[str]) -> int:
    """List the services."""
    parser = Parser(prog="disagg-ray ls", description=ls.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    options = parser.parse_args(argv)
    from disagg_ray.driver.cluster import join

    join(None)
    from disagg_ray.report.tables import print_services, services_to_json
    from disagg_ray.service import lifecycle

    snapshots = lifecycle.list_all()
    if options.json:
        print(services_to_json(snapshots))
    else:
        print_services(snapshots)
    return 0


def down(argv: Sequence[str]) -> int:
    """Shut a service down."""
    parser = Parser(prog="disagg-ray down", description=down.__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--drain", action="store_true", help="let running requests finish first")
    parser.add_argument("--grace", type=float, default=3600.0, metavar="SECONDS", help="time limit of --drain")
    options = parser.parse_args(argv)
    if not 0 <= options.grace <= MOST_S:
        raise InputError(f"invalid --grace={options.grace:g}: must be from 0 to {MOST_S} seconds")
    _join_for(options.name, None)
    from disagg_ray.service import lifecycle

    lifecycle.down(options.name, options.grace if options.drain else 0.0)
    print(f"{options.name} is down")
    return 0


def scale(argv: Sequence[str]) -> int:
    """Change how many replicas a stage of a service has."""
    parser = Parser(prog="disagg-ray scale", description=scale.__doc__)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("stages", nargs="+", metavar="STAGE=NUMBER", help="such as transformer=4")
    options = parser.parse_args(argv)
    asked = [_parse_scale(text) for text in options.stages]
    _join_for(options.name, None)
    from disagg_ray.service import lifecycle

    for stage, number in asked:
        lifecycle.scale(options.name, stage, number)
        print(f"{options.name}: {stage} gets {number} replicas")
    return 0


def _parse_scale(text: str) -> tuple[str, int]:
    stage, _, number = text.partition("=")
    if not stage or not number.isdecimal() or int(number) < 1:
        raise InputError(f"invalid STAGE=NUMBER {shown(text)}: must be a stage and at least 1, as transformer=4")
    return stage, int(number)


def _join_for(name: str, address: str | None) -> None:
    """Join the cluster of a service, whose name is checked first."""
    from disagg_ray.driver.cluster import join
    from disagg_ray.driver.names import check_name

    check_name(name)
    join(address)
