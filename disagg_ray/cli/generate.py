"""`disagg-ray generate`: one video, or a batch of them."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_ray.cli import logs
from disagg_ray.cli.arguments import config_parser, overrides_of
from disagg_ray.config.docs import field_docs
from disagg_ray.config.load import load_config, parse_override
from disagg_ray.config.rules import kinds
from disagg_ray.config.schema import Config
from disagg_ray.driver.signals import Interrupts, interruptible
from disagg_ray.environment import expand_home, in_ray_job
from disagg_ray.errors import InputError, OutputError, SaveError
from disagg_ray.media.places import check_folder, check_output, check_trace, format_of, local_path
from disagg_ray.media.sound import wav_beside
from disagg_ray.media.video import check_writer
from disagg_ray.models.prompts import check_prompts
from disagg_ray.request import TYPES, Request, resolve
from disagg_ray.result import Result, rescued

if TYPE_CHECKING:
    from disagg_ray.local import LocalPipeline
    from disagg_ray.pipeline import Pipeline
    from disagg_ray.progress.display import Display, Mode
    from disagg_ray.report.timeline import Works
    from disagg_ray.service.client import Connection


OUTPUT = "file or URL to write: .mp4, .gif, .npy, or a folder for png files; of an image .png, .webp, .jpg or .npy"


def generate(argv: Sequence[str]) -> int:
    """Generate one video or image, or with --requests many."""
    parser = config_parser("generate", generate)
    parser.add_argument("--connect", metavar="NAME", help="use the service that `disagg-ray up NAME` deployed")
    parser.add_argument("--output", help=OUTPUT)
    parser.add_argument("--local", action="store_true", help="run all stages in this process, without Ray")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--quiet", action="store_true", help="show no progress, log only warnings")
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="text, or one JSON object a line")
    parser.add_argument("--trace", metavar="FILE", help="write a .json trace for ui.perfetto.dev")
    _add_request_flags(parser)
    _add_batch_flags(parser)
    options = parser.parse_intermixed_args(argv)
    _check_source(options)
    logs.set_up(options.log_format, quiet=options.quiet)
    if options.trace is not None:
        check_trace(options.trace, in_job=in_ray_job())
    single = ("output", "local", "overwrite", *(f.name for f in fields(Request)))
    if options.requests is not None:
        _refuse(options, single, "leave it out; fields of a request belong in the lines of that file")
    else:
        _refuse(options, BATCH_FLAGS, "give both, or neither")
    if options.connect is not None:
        from disagg_ray.driver.cluster import join

        join(None)
    return _generate_one(options) if options.requests is None else _generate_many(options)


def _generate_one(options: argparse.Namespace) -> int:
    if options.output is None:
        raise InputError("--output: not given; give a file (video.mp4, image.png), or --requests and --output-dir")
    config = _config_of(options)
    check_output(options.output, overwrite=options.overwrite, in_job=in_ray_job())
    given = {f.name: getattr(options, f.name, None) for f in fields(Request)}
    request = Request(**{k: v for k, v in given.items() if v is not None}, format=format_of(options.output))
    resolved, _ = resolve(request, config)  # invalid input fails before anything starts
    if resolved.format == "npy" and config.model.traits.sound_rate is not None:
        check_output(wav_beside(options.output), overwrite=options.overwrite, in_job=in_ray_job())
    check_prompts(resolved, config.model)
    if options.local:
        check_writer(resolved.format)

    from disagg_ray.report.tables import print_result

    with _start(config, options, 1) as pipeline:
        result = pipeline.generate(request)
        with interruptible():
            path = _save(result, options)
        print_result(result, pipeline.weights, pipeline.pools)
        for written in (path, *([wav_beside(str(path))] if result.sound else [])):
            print(f"wrote {written}")
    if options.trace is not None:
        _write_trace(options.trace, [(result.request.id, result.stages)])
    return 0


def _save(result: Result, options: argparse.Namespace) -> Path | str:
    """Write the file to --output, or, if that fails, to another folder.

    Raises:
        SaveError: names that other place.
    """
    try:
        return result.save(options.output, overwrite=options.overwrite)
    except OutputError as error:
        raise SaveError(f"{error}; {rescued(result)}") from error


def _generate_many(options: argparse.Namespace) -> int:
    if options.output_dir is None:
        raise InputError("--output-dir: not given; give the folder for the files")
    check_folder(options.output_dir, in_job=in_ray_job())
    config = _config_of(options)

    from disagg_ray.batch import run as batch
    from disagg_ray.batch.manifest import read_manifest
    from disagg_ray.batch.resume import Options

    given = {name: getattr(options, name) for name in ("verify", "retry_failed", "skip_invalid")}
    asked = Options(expand_home(options.requests), local_path(options.output_dir), **given)
    summary = batch.generate(asked, config, partial(_start_on_ray, config, options))
    if options.trace is not None:
        records = deque(read_manifest(asked.output_dir), maxlen=summary.recorded)  # the last ones are this run's
        _write_trace(options.trace, [(record.id, record.stages) for record in records])
    return 0 if summary.complete else 1


def _write_trace(path: str, works: Works) -> None:
    from disagg_ray.report.trace import write_trace

    print(f"wrote {write_trace(local_path(path), works)}")


BATCH_FLAGS = ("output_dir", "verify", "retry_failed", "skip_invalid")


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    many = parser.add_argument_group("many requests")
    many.add_argument(
        "--requests",
        metavar="FILE",
        help="JSON lines file, a request a line; `id` names the file",
    )
    many.add_argument("--output-dir", metavar="FOLDER", help="folder for files and manifest; run again to resume")
    many.add_argument("--verify", action="store_true", help="check finished files by digest, not by modification time")
    many.add_argument("--retry-failed", action="store_true", help="retry requests that failed in an earlier run")
    many.add_argument("--skip-invalid", action="store_true", help="skip invalid lines")


def _refuse(options: argparse.Namespace, names: Iterable[str], remedy: str) -> None:
    for name in names:
        if getattr(options, name, None) not in (None, False):
            raise InputError(
                f"--{name.replace('_', '-')}: given {'with' if options.requests else 'without'} --requests: {remedy}"
            )


def _check_source(options: argparse.Namespace) -> None:
    if (options.config is None) == (options.connect is None):
        raise InputError("--config: give either a YAML file, or the NAME of a service as --connect")
    overrides = overrides_of(options)
    if options.connect is not None and (overrides or options.local):
        for override in overrides:  # what is none belongs to a flag, and its message says so
            parse_override(override)
        given = overrides[0] if overrides else "--local"
        raise InputError(f"--connect: {given} has no effect on a service; leave it out, or run `disagg-ray up` again")


def _config_of(options: argparse.Namespace) -> Config:
    if options.config is not None:
        return load_config(options.config, *overrides_of(options))
    from disagg_ray.service.stub import take_snapshot

    return take_snapshot(options.connect).config


@contextmanager
def _start(config: Config, options: argparse.Namespace, total: int) -> Iterator[LocalPipeline | Pipeline | Connection]:
    """Start the pipeline, show its progress, and close it whatever happens."""
    if not options.local:
        with _start_on_ray(config, options, total) as pipeline:
            yield pipeline
        return
    from disagg_ray.local import LocalPipeline

    with _display(options, total, config) as display, LocalPipeline(config, display.on_event) as local:
        yield local


@contextmanager
def _start_on_ray(config: Config, options: argparse.Namespace, total: int) -> Iterator[Pipeline | Connection]:
    from disagg_ray.pipeline import Pipeline
    from disagg_ray.service.client import Connection

    with Interrupts(), _display(options, total, config) as display:
        pipeline: Pipeline | Connection
        if options.connect is not None:
            run_id = str(local_path(options.output_dir).absolute()) if options.output_dir else None
            pipeline = Connection(options.connect, run_id=run_id, on_event=display.on_event)
        else:
            pipeline = Pipeline(config, display.on_event)
        with pipeline:
            yield pipeline


def _display(options: argparse.Namespace, total: int, config: Config) -> Display:
    from disagg_ray.progress.display import Display

    mode: Mode = "quiet" if options.quiet or options.log_format == "json" else "auto"
    return Display(total, mode, makes=config.model.traits.makes)


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every field of Request but `format`, which the output's suffix decides."""
    docs = field_docs(Request)
    for f in fields(Request):
        if f.name != "format":
            kind, flag = TYPES.get(f.name, str), f"--{f.name.replace('_', '-')}"
            several = kinds(Request)[f.name].item is not None
            how = "append" if several else "store"
            text = docs[f.name] + " Once for each." * several
            parser.add_argument(flag, type=kind, action=how, metavar=kind.__name__, help=text)
