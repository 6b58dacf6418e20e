"""How many tokens a text is to a model, counted as it is encoded: cleaned first, as the stock pipelines do."""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import ftfy

from disagg_ray.config.schema import ModelConfig
from disagg_ray.errors import CheckpointError, RequestError
from disagg_ray.models.checkpoint import find_here
from disagg_ray.models.components import check_component, read_components
from disagg_ray.models.files import read_json
from disagg_ray.request import ResolvedRequest


def check_prompts(request: ResolvedRequest, model: ModelConfig) -> None:
    """Refuse texts that the model would cut off, where its tokenizer is on this machine; else a replica does.

    Raises:
        RequestError: a text has more tokens than the model reads.
    """
    texts = {"prompt": request.prompt} | ({"negative_prompt": request.negative_prompt} if request.guided else {})
    for field, text in texts.items():
        cleaned = clean(text)
        if _most_tokens(cleaned) <= model.max_sequence_length:
            continue  # most texts are, so that most drivers never load a tokenizer
        folder = find_here(model)
        if folder is not None and (tokenizer := _tokenizer(folder)) is not None:
            check_length(field, tokenizer, cleaned, model.max_sequence_length)


def check_length(field: str, tokenizer: Any, cleaned: str, most: int) -> None:
    """Refuse a cleaned text of more tokens, the tokenizer's own included, than a model reads."""
    num_tokens = len(tokenizer(cleaned, add_special_tokens=True).input_ids)
    if num_tokens > most:
        raise RequestError(
            f"{field}: {num_tokens} tokens are over the model's {most}; what is past them would be cut off unseen, so "
            f"shorten it"
        )


def clean(text: str) -> str:
    """Return a text as it is encoded. Source: `prompt_clean` of diffusers' Wan pipelines, slow to import."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()


def _most_tokens(cleaned: str) -> int:
    """Return an upper bound: a token is a byte or more of what a tokenizer normalises to, and one ends the text."""
    return len(unicodedata.normalize("NFKC", cleaned).encode()) + 2


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a local folder; None: it cannot be loaded, which the replica reports."""
    from disagg_ray.models.load import load_component  # seconds of imports that most drivers do without

    index = folder / "model_index.json"
    try:
        components = read_components(read_json(index), index)
        check_component(folder, "tokenizer")
        return load_component(folder, "tokenizer", components.get("tokenizer", ""))
    except CheckpointError:
        return None
