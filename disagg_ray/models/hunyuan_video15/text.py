"""What HunyuanVideo 1.5's tokenizers get of a prompt: a question to a chat model, and what of the prompt is quoted.

Source: diffusers' `HunyuanVideo15Pipeline`, with the chat template of Qwen2.5-VL; a folder's own template is a program,
and is not run.
"""

import re

from disagg_ray.errors import RequestError

SYSTEM = (" " * 9).join(
    (
        "You are a helpful assistant. Describe the video by detailing the following aspects:",
        "1. The main content and theme of the video.",
        "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
        "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
        "4. background environment, light, style and atmosphere.",
        "5. camera angles, movements, and transitions used in the video.",
    )
)
BEFORE = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
AFTER = "<|im_end|>\n<|im_start|>assistant\n"

NUM_DROPPED = 108
"""Tokens at its beginning, those of `BEFORE`, that the model never sees."""
MOST_TOKENS = 1000
"""Of a prompt, as the stock pipeline has it."""

QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")
MOST_QUOTED = 256
"""Tokens of quoted texts, as the stock pipeline has it."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised."""
    return f"{BEFORE}{text or ' '}{AFTER}"


def quoted(text: str) -> str | None:
    """Return the texts in quotes, each once, as they are tokenised for the second encoder; None: there are none."""
    found = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(text))
    return "".join(f'Text "{each}". ' for each in found) or None


def check(field: str, text: str) -> None:
    """Refuse quoted texts that the second tokenizer would cut off: to it a byte is a token, and their end one more.

    Raises:
        RequestError: names the field.
    """
    num_tokens = len((quoted(text) or "").encode()) + 1
    if num_tokens > MOST_QUOTED:
        raise RequestError(
            f"{field}: its texts in quotes are {num_tokens} tokens, over the {MOST_QUOTED} that the model reads of "
            f"them; what is past them would be cut off unseen, so quote less"
        )
