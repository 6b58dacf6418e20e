"""Schemas that refuse what they do not name."""

from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator


def closed(schema: Any) -> Any:
    """Return a schema that refuses fields which it does not name, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(each) for key, each in schema.items()}
    if "properties" in schema:
        found["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    return found


def errors(path: Path, kind: str, document: Any) -> list[str]:
    """Return what a document has against one definition of a file of schemas."""
    schema = {"$ref": f"#/$defs/{kind}"} | closed(yaml.safe_load(path.read_text()))
    return [f"{each.json_path}: {each.message}" for each in Draft202012Validator(schema).iter_errors(document)]
