"""What LTX-2's tokenizer gets of a prompt."""

NUM_DROPPED = 0
"""Tokens at its beginning that the model never sees."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised: without space around it, as the stock pipeline strips it."""
    return text.strip()
