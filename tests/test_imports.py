"""Imports go one way, and each foreign library has one importer."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from disagg_ray.models.families import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "disagg_ray"

LAYERS = (
    {"jobs"},
    {"cli"},
    {"report", "doctor", "http"},
    {"batch", "planning"},
    {"__init__"},
    {"service"},
    {"pipeline", "local"},
    {"driver"},
    {"replica"},
    {"models", "scheduling", "result"},
    {"progress", "request"},
    {"inputs"},
    {"transfer", "media"},
    {"config", "graph"},
    {"families"},
    {"environment", "process"},
    {"errors", "text", "version"},
)
"""Rooms of the package, highest first; each imports only from those below. A folder is one room."""

IMPORTERS = {
    "mooncake": {"transfer.engine"},
    "imageio": {"media"},
    "imageio_ffmpeg": {"media"},
    "PIL": {"media", "jobs"},
    "omegaconf": {"config.load"},
    "yaml": {"config"},
    "fsspec": {"media.storage"},
    "safetensors": {"driver.latents", "models", "jobs"},
    "rich": {"report", "progress.bars", "doctor"},
    "zmq": {"progress"},
    "msgpack": {"progress"},
    "packaging": {"doctor"},
    "diffusers": {"models", "jobs"},
    "transformers": {"models", "jobs"},
    "tokenizers": {"models", "jobs"},
    "huggingface_hub": {"models"},
    "ray": {"pipeline", "driver", "service", "http", "replica.actor", "replica.gang", "doctor", "jobs"},
    "fastapi": {"http.app", "http.follow", "http.forms", "http.images", "http.routes"},
    "sqlalchemy": {"http.database", "http.store", "http.workers", "http.app", "http.uploads"},
    "starlette": {"http"},
    "accelerate": {"models"},
    "torchao": {"models"},
    "flash_attn": {"models.attention"},
}
"""Foreign libraries, and the modules or units that may import them."""

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
} | {f"jobs.{path.stem}": path for path in sorted((ROOT / "jobs").rglob("*.py"))}  # fmt: skip
"""Every module by its name below the package."""

FAMILY_DATA = [["models", name, file] for name in FAMILIES for file in ("__init__", "component_configs")]


@cache
def parse(path: Path) -> list[ast.AST]:
    """Return every node that runs, function bodies included and `if TYPE_CHECKING:` left out."""
    nodes: list[ast.AST] = []
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        nodes.append(node)
        typing_only = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        pending += node.orelse if typing_only and isinstance(node, ast.If) else ast.iter_child_nodes(node)
    return nodes


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of every module or attribute a file imports."""
    for node in parse(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    found = set()
    for name in imported(path):
        first, *parts = name.split(".")
        if first == "disagg_ray":
            while parts and not {".".join(parts), ".".join([*parts, "__init__"])} & set(FILES):
                parts.pop()
            dotted = ".".join(parts)
            found.add(dotted if dotted in FILES else ".".join([*parts, "__init__"]))
    return found


def layer_of(module: str) -> int:
    """Return how far down a module is; what families say of themselves, as data, is below `config`, which asks it."""
    unit = module.split(".", maxsplit=1)[0]
    parts = module.split(".")
    if parts[:2] in (["models", "family"], ["models", "families"]) or parts in FAMILY_DATA:
        unit = "families"
    return next((depth for depth, units in enumerate(LAYERS) if unit in units), -1)


def is_sibling(module: str, other: str) -> bool:
    return "." in module and module.split(".", maxsplit=1)[0] == other.split(".", maxsplit=1)[0]


def test_the_reader_of_imports_sees_functions_and_skips_typing(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "if TYPE_CHECKING:\n    import PIL\nelse:\n    import zmq\n"
        "def late():\n    from disagg_ray.models.wan import random\n    from disagg_ray import Request, graph\n"
    )
    assert set(imported(path)) == {"zmq", "disagg_ray.models.wan.random", "disagg_ray.Request", "disagg_ray.graph"}
    assert own_modules(path) == {"models.wan.random", "__init__", "graph"}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    assert layer_of(module) >= 0, f"{module} has no layer: give it one"
    upwards = {
        other
        for other in own_modules(FILES[module])
        if not is_sibling(module, other) and layer_of(other) <= layer_of(module)
    }
    assert not upwards


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter({module: own_modules(path) - {module} for module, path in FILES.items()}).prepare()


@pytest.mark.parametrize("module", FILES)
def test_each_foreign_library_has_its_importers(module: str) -> None:
    libraries = {name.split(".")[0] for name in imported(FILES[module])} & set(IMPORTERS)
    unit = module.split(".", maxsplit=1)[0]
    assert not {library for library in libraries if not {module, unit} & IMPORTERS[library]}


@pytest.mark.parametrize("library", ["mooncake", "imageio", "PIL", "yaml", "fsspec", "diffusers", "ray", "zmq"])
def test_each_importer_is_seen(library: str) -> None:
    assert any(name.split(".")[0] == library for path in FILES.values() for name in imported(path))


@pytest.mark.parametrize("module", sorted(set(FILES) - {"environment"}))
def test_only_environment_touches_environment_variables(module: str) -> None:
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    touched = {node.attr for node in parse(FILES[module]) if isinstance(node, ast.Attribute) and node.attr in names}
    touched |= {name for name in imported(FILES[module]) if name.rpartition(".")[2] in names}
    assert not touched


def test_checking_a_request_imports_neither_ray_nor_torch() -> None:
    code = (
        "import sys; from disagg_ray import Request, load_config; from disagg_ray.request import resolve;"
        f"resolve(Request(prompt='a cat'), load_config({str(ROOT / 'conf' / 'tiny_t2v.yaml')!r}));"
        "print(sorted({'ray', 'torch', 'diffusers', 'transformers', 'mooncake'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "[]\n"
