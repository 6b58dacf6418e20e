"""What Qwen-Image-Edit's tokenizer gets of a prompt: a chat about an image. Source: diffusers' `prompt_templates`."""

IMAGE = "<|image_pad|>"
"""Where the model sees an image."""

PICTURE = f"<|vision_start|>{IMAGE}<|vision_end|>"
"""What stands before the text for an image."""

PIXELS = 1024 * 1024
"""About as large an image is made before the text encoder sees it. Source: stock."""

TEMPLATE = (
    "<|im_start|>system\n"
    "Describe the key features of the input image (color, shape, size, texture, objects, background), "
    "then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency "
    "with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)

NUM_DROPPED = 64
"""Tokens at its beginning that the model never sees."""

RESERVED = (IMAGE, "<|video_pad|>")
"""For each of which the model would want pixels."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised, with one token in place of the image's."""
    return TEMPLATE.format(PICTURE + text)
