"""The configuration: every key with its meaning and default, the rules between keys, YAML in.

`schema` and the modules that it names are frozen dataclasses with the rules of their keys beside them; `load` alone
reads files and overrides. Text enters; a checked `Config` leaves, or a ConfigError that names key, value
and remedy.
"""

from disagg_ray.config.schema import Config

__all__ = ["Config"]
