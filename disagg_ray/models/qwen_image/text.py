"""What Qwen-Image's tokenizer gets of a prompt: a question to a chat model. Source: diffusers' `prompt_templates`."""

TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

NUM_DROPPED = 34
"""Tokens at its beginning that the model never sees."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised."""
    return TEMPLATE.format(text)
