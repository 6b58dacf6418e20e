"""What Qwen-Image-Edit-Plus' tokenizer gets of a prompt: a chat about images with numbers. Source: as `edit_text`."""

from disagg_ray.models.qwen_image import edit_text

PICTURE = f"Picture {{}}: {edit_text.PICTURE}"
"""What stands before the text for each image, with its number from 1 on."""

PIXELS = 384 * 384
TEMPLATE, NUM_DROPPED, RESERVED = edit_text.TEMPLATE, edit_text.NUM_DROPPED, edit_text.RESERVED
"""As there."""


def prepare(text: str) -> str:
    """Return a text as it is tokenised after one image, with one token in place of the image's."""
    return TEMPLATE.format(PICTURE.format(1) + text)
