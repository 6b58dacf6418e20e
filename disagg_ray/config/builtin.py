"""The configurations of the package: `builtin:NAME` is conf/NAME.yaml, wherever the package is installed."""

from __future__ import annotations

from pathlib import Path

from disagg_ray.environment import expand_home
from disagg_ray.errors import ConfigError
from disagg_ray.text import did_you_mean, shown

BUILTIN = "builtin:"
CONF = Path(__file__).parent.parent / "conf"
"""In the repository a link to its conf/, in a wheel a copy."""


def list_builtin() -> dict[str, str]:
    """Return the names of the package's configurations, each with the sentence that its file begins with."""
    lines = {path.stem: path.read_text("utf-8").partition("\n")[0] for path in sorted(CONF.glob("*.yaml"))}
    return {name: line.partition(". ")[0].strip("# .") + "." for name, line in lines.items()}


def find_file(path: str | Path) -> Path:
    """Return the file that a `--config` or a `base:` names: a path, or `builtin:NAME`.

    Raises:
        ConfigError: the package has no such configuration; names the nearest.
    """
    if not str(path).startswith(BUILTIN):
        return expand_home(path)
    name, known = str(path).removeprefix(BUILTIN), list_builtin()
    if name not in known:
        near = did_you_mean(name, known) or "; `disagg-ray config --list` names them"
        raise ConfigError(f"config: no configuration {shown(name)} comes with the package{near}")
    return CONF / f"{name}.yaml"


def anywhere(path: str | Path) -> str:
    """Return what names the same file from every folder."""
    return str(path) if str(path).startswith(BUILTIN) else str(find_file(path).absolute())
