"""How many tokens a text is to a model, counted as it is encoded: prepared first, as the stock pipelines do."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from disagg_ray.config.model import ModelConfig
from disagg_ray.errors import CheckpointError, RequestError
from disagg_ray.models.checkpoint import find_here
from disagg_ray.models.components import check_component, read_components
from disagg_ray.models.families import FAMILIES
from disagg_ray.models.files import read_json
from disagg_ray.request import ResolvedRequest


def check_prompts(request: ResolvedRequest, model: ModelConfig) -> None:
    """Refuse texts that the model would cut off, where its tokenizer is on this machine; else a replica does.

    Raises:
        RequestError: a text has more tokens than the model reads, holds one that is reserved, or its family refuses it.
    """
    text = FAMILIES[model.family].part(model.traits.text)
    texts = {"prompt": request.prompt} | ({"negative_prompt": request.negative_prompt} if request.guided else {})
    for field, asked in texts.items():
        for mark in getattr(text, "RESERVED", ()):
            if mark in asked:
                raise RequestError(f"{field}: it holds {mark}, which marks for the model what is no text; take it out")
        if hasattr(text, "check"):
            text.check(field, asked)
        prepared = text.prepare(asked)
        if _most_tokens(prepared) - text.NUM_DROPPED <= model.max_sequence_length:
            continue  # most texts are, so that most drivers never load a tokenizer
        folder = find_here(model)
        if folder is not None and (tokenizer := _tokenizer(model.family, folder)) is not None:
            check_length(field, tokenizer, prepared, model.max_sequence_length, text.NUM_DROPPED)


def check_length(field: str, tokenizer: Any, prepared: str, most: int, num_dropped: int = 0) -> None:
    """Refuse a prepared text of more tokens, the tokenizer's own included, than a model reads."""
    num_tokens = len(tokenizer(prepared, add_special_tokens=True).input_ids) - num_dropped
    if num_tokens > most:
        raise RequestError(
            f"{field}: {num_tokens} tokens are over the model's {most}; what is past them would be cut off unseen, so "
            f"shorten it"
        )


def _most_tokens(prepared: str) -> int:
    """Return an upper bound: a token is a byte or more of what a tokenizer normalises to, and one ends the text."""
    return max(len(unicodedata.normalize(form, prepared).encode()) for form in ("NFC", "NFKC")) + 2


@lru_cache(maxsize=4)
def _tokenizer(name: str, folder: Path) -> Any:
    """Return the tokenizer of a local folder of that family; None: it cannot be loaded, which the replica reports."""
    from disagg_ray.models.load import load_component  # seconds of imports that most drivers do without

    family, index = FAMILIES[name], folder / "model_index.json"
    try:
        components = read_components(family, read_json(index), index)
        check_component(family, folder, "tokenizer")
        return load_component(family.components["tokenizer"], folder, "tokenizer", components.get("tokenizer", ""))
    except CheckpointError:
        return None
