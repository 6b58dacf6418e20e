"""The `disagg-ray` command: arguments in, exit status out; all work is done by the rooms below."""

from disagg_ray.cli.command import main

__all__ = ["main"]
