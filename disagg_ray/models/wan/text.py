"""What Wan's tokenizer gets of a prompt."""

from __future__ import annotations

import html
import re

import ftfy

NUM_DROPPED = 0
"""Tokens at the beginning that the model never sees."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised. Source: `prompt_clean` of diffusers' Wan pipelines, slow to import."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()
