"""The commands about services over HTTP: serve, keys."""

from __future__ import annotations

import argparse
import errno
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_ray import environment
from disagg_ray.cli.arguments import CONFIG, EPILOG, Parser, add_overrides, overrides_of
from disagg_ray.config.builtin import find_file
from disagg_ray.config.load import load_config
from disagg_ray.config.schema import Config
from disagg_ray.environment import expand_home
from disagg_ray.errors import InputError, StartError
from disagg_ray.models.preflight import check_model
from disagg_ray.text import shown

if TYPE_CHECKING:
    from disagg_ray.http.settings import Settings

EXTRA = "needs the extra `serve`: pip install 'disagg-ray[serve]'"


def serve(argv: Sequence[str]) -> int:
    """Serve models over HTTP: OpenAI's videos API, and a page to try it on; Ctrl-C ends it."""
    parser = Parser(prog="disagg-ray serve", description=serve.__doc__, epilog=EPILOG)
    add_overrides(parser)
    parser.add_argument("--config", help=f"{CONFIG}; it is put up too")
    parser.add_argument("--name", help="with --config: the model's id; the file's name if left out")
    parser.add_argument("--connect", nargs="+", metavar="NAME", help="serve pipelines that `disagg-ray up` put up")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; others than this machine need keys")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free, which is printed")
    options = parser.parse_intermixed_args(argv)
    names = [name for name in options.connect or () if "=" not in name]
    options.overrides += [name for name in options.connect or () if "=" in name]
    if (options.config is None) == (not names):
        raise InputError("--config: give a YAML file to put up, or --connect NAME of services that run, and not both")
    if options.name is not None and names:
        raise InputError("--name: it goes with --config; a service has its name")
    if options.speed is not None and names:
        raise InputError("--speed: it goes with --config; a service that runs has its own")
    _find_port(options.host, options.port)
    try:
        import disagg_ray.http.app  # noqa: F401 - whether what it needs is installed
        from disagg_ray.http.keys import digest_of, new_key, read_keys
        from disagg_ray.http.settings import make_settings
    except ImportError as error:
        raise StartError(f"`disagg-ray serve` {EXTRA} ({error})") from error
    with ExitStack() as stack:
        if names:
            config = _connect(names, options.overrides)
        else:
            names = [options.name or find_file(options.config).stem]
            config = load_config(options.config, *overrides_of(options))
        _check_host(options.host, config)
        key = new_key() if config.service.api_keys is not None else None
        settings = make_settings(tuple(names), config, session_key=digest_of(key) if key is not None else None)
        if settings.service.api_keys is not None and not read_keys(Path(settings.service.api_keys)):
            print(f"{settings.service.api_keys} has no key yet: only the one printed below is valid", flush=True)
        if options.config is not None:
            stack.enter_context(_put_up(names[0], config, settings))
        _serve(settings, key, options)
    return 0


def _serve(settings: Settings, key: str | None, options: argparse.Namespace) -> None:
    """Serve until a signal comes."""
    from disagg_ray.http.app import serving

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = _find_port(options.host, options.port)  # Ray Serve tells nobody what it takes for 0
    with serving(settings, options.host, port):
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"page: http://{host}:{port}/\nAPI:  http://{host}:{port}/v1", flush=True)
        if key is not None:
            print(f"key: {key}", flush=True)
        threading.Event().wait()


def _check_host(host: str, config: Config) -> None:
    """Refuse to listen for other machines without keys."""
    from disagg_ray.http.guard import is_loopback

    if config.service.api_keys is None and not is_loopback(host):
        raise InputError(
            f"invalid --host={shown(host)}: without keys must be this machine, as 127.0.0.1; set "
            f"service.api_keys=FILE, which `disagg-ray keys add NAME --file FILE` writes"
        )


def _find_port(host: str, port: int) -> int:
    """Return a port of `host` on which one can listen now: `port`, or for 0 any.

    Raises:
        InputError: there is none; names the argument that is wrong.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            return int(listener.getsockname()[1])
    except (socket.gaierror, UnicodeError) as error:  # no address of it is known
        raise InputError(f"invalid --host={shown(host)}: {error}; must be an address of this machine") from error
    except OverflowError as error:
        raise InputError(f"invalid --port={port}: must be from 0 to 65535") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"invalid --host={shown(host)}: must be an address of this machine") from error
        raise InputError(f"invalid --port={port}: cannot listen on {host}: {error.strerror}; give another") from error


def _connect(names: list[str], overrides: list[str]) -> Config:
    """Join the cluster that is there; return the first service's configuration, with other settings of its section."""
    from disagg_ray.driver.cluster import join
    from disagg_ray.http.settings import KEYS, override, parse_value
    from disagg_ray.service.stub import take_snapshot

    given = {}
    for text in overrides:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        if section != "service" or name not in KEYS:
            raise InputError(
                f"{shown(text)} has no effect: the service runs already; only service.{', service.'.join(KEYS)} can be "
                f"given here"
            )
        given[name] = parse_value(name, value)
    join(None)
    configs = [take_snapshot(name).config for name in names]
    return override(configs[0], given)


@contextmanager
def _put_up(name: str, config: Config, settings: Settings) -> Iterator[None]:
    """Put a pipeline up in the cluster that is given, or in one of our own; take it down at the end."""
    from disagg_ray.driver.address import LOCAL
    from disagg_ray.driver.cluster import Cluster
    from disagg_ray.driver.names import check_name
    from disagg_ray.service import lifecycle

    check_name(name)
    check_model(config, whole=False)
    if (config.cluster.address or environment.ray_address() or LOCAL) == LOCAL:
        _check_storage(settings)
    environment.default("GRPC_VERBOSITY", "ERROR")  # it logs every process that starts, as ffmpeg for a thumbnail
    cluster = Cluster(config)
    try:
        if cluster.is_own and config.transport.admit == "auto":
            config = replace(config, transport=replace(config.transport, admit="host"))
        lifecycle.up(name, config)
        try:
            yield
        finally:
            lifecycle.down(name, 0.0)
    finally:
        cluster.close()


def _check_storage(settings: Settings) -> None:
    """Refuse a folder or a database that takes nothing, which Ray Serve would say in tracebacks only."""
    from disagg_ray.http.files import Folder
    from disagg_ray.http.store import Store

    Folder(settings.service.folder)
    Store(settings.database).close()


def keys(argv: Sequence[str]) -> int:
    """Add, list or remove the keys of an HTTP service; a key is printed once and kept as a digest.

    A day is the last 24 hours; what failed does not count, what was cancelled or deleted does.
    """
    parser = Parser(prog="disagg-ray keys", description=keys.__doc__)
    parser.add_argument("action", choices=("add", "list", "remove"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a tenant: what is asked for with a key is its own")
    parser.add_argument("--file", required=True, type=expand_home, help="the file that service.api_keys names")
    parser.add_argument("--in-flight", dest="max_in_flight", type=int, metavar="N", help="most unfinished jobs at once")
    parser.add_argument("--seconds-a-day", type=float, metavar="SECONDS", help="most seconds of video within a day")
    parser.add_argument("--images-a-day", type=int, metavar="N", help="most images within a day")
    parser.add_argument("--priority", type=int, help="added to that of its requests")
    options = parser.parse_args(argv)
    from disagg_ray.http.keys import LIMITS, Key, add_key, read_keys, remove_key

    if (options.name is None) != (options.action == "list"):
        raise InputError("NAME: give one to add or remove, and none to list")
    limits = {name: getattr(options, name) for name in LIMITS if getattr(options, name) is not None}
    if limits and options.action != "add":
        raise InputError(f"{LIMITS[next(iter(limits))]}: it goes with `add`; leave it out")
    if options.action == "add":
        print(f"key: {add_key(options.file, Key(options.name, **limits))}")
    elif options.action == "remove":
        remove_key(options.file, options.name)
        print(f"{options.name} is removed")
    else:
        for key in (found := read_keys(options.file, "--file")):
            print(f"{key.name}: in flight {key.max_in_flight or 'any'}, seconds a day {key.seconds_a_day or 'any'}, "
                  f"images a day {key.images_a_day or 'any'}, priority {key.priority}")  # fmt: skip
        if not found:
            print(f"{options.file} {'has no key' if options.file.exists() else 'is not there'}")
    return 0
