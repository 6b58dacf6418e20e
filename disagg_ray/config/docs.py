"""The reference of every key, made from the schema: what `disagg-ray config --docs` prints."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from disagg_ray.config.options import LoraConfig
from disagg_ray.config.schema import Config, GroupConfig, StageConfig

OF_EACH: dict[str, type] = {
    "stages": StageConfig, "stages.NAME.groups": GroupConfig, "stages.NAME.denoiser.loras": LoraConfig,
}  # fmt: skip
"""Keys that hold any number of the same, and of what."""
HEAD = """# Configuration

Every key, its default and its meaning; made by `disagg-ray config --docs` from
[disagg_ray/config/schema.py](../disagg_ray/config/schema.py). `base: FILE` names a file below, whose keys a file
changes; `KEY=VALUE` arguments come last. `disagg-ray config --config FILE` prints what came of it.

Text is read as its key's type says: `revision: 0123456` and `negative_prompt: no` are text, and so is all that follows
`=` in an override. `${...}` is refused but in `defaults.negative_prompt`: nothing is put in its place. `~` is your home
in paths; variables are for the shell to expand. A key that has no effect (`offload` on a CPU, `cluster.dashboard` of a
cluster that is joined) is refused by name. Passwords in URLs are hidden wherever a configuration is printed.

`fused=true` puts all blocks into one stage, with the largest of their resources and the sum of their `memory`; what
one stage cannot have at once is refused, naming both. A stage set to `null` is left out, so that others can take its
blocks.
"""


def to_markdown() -> str:
    """Return the page: a table for each part of the schema."""
    return HEAD + "".join(_section(prefix, cls) for prefix, cls in _parts(Config, ""))


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


def _parts(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield every dataclass of the schema with what its keys begin with, outer ones first."""
    yield prefix, cls
    for f in fields(cls):
        key = f"{prefix}{f.name}"
        if key in OF_EACH:
            yield from _parts(OF_EACH[key], f"{key}{'[]' if f.name == 'loras' else '.NAME'}.")
        elif is_dataclass(value := _default(f)):
            yield from _parts(type(value), f"{key}.")


def _section(prefix: str, cls: Any) -> str:
    docs = field_docs(cls)
    plain = [f for f in fields(cls) if not is_dataclass(_default(f))]
    rows = "".join(f"| `{prefix}{f.name}` | {_show(_default(f))} | {_cell(docs.get(f.name, ''))} |\n" for f in plain)
    about = inspect.cleandoc(cls.__doc__) if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") else ""
    title = f"`{prefix.removesuffix('.')}`" if prefix else "Top level"
    return f"\n## {title}\n\n{about + chr(10) * 2 if about else ''}| key | default | meaning |\n|---|---|---|\n{rows}"


def _default(f: Field[Any]) -> Any:
    return (
        f.default if f.default is not MISSING else f.default_factory() if f.default_factory is not MISSING else MISSING
    )


def _show(value: object) -> str:
    """Return a default as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    if value in ("???", MISSING):
        return "required"
    if value is None or isinstance(value, bool):
        return f"`{words[value]}`"
    return "`{}`" if value == {} else "`''`" if value == "" else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
