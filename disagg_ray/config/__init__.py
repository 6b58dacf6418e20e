"""The configuration: every key with its meaning and default, the rules between keys, YAML in.

`schema` and `options` are frozen dataclasses that everything else is handed; `rules` says which values go together;
`load` alone reads files and overrides. What enters is text; what leaves is a checked `Config`, or a ConfigError that
names key, value and remedy.
"""

from disagg_ray.config.schema import Config

__all__ = ["Config"]
