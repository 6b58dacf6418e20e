"""What a newcomer sees first: a clip from a prompt, a clip from a first frame, and a sheet of both.

python jobs/demo.py            # writes outputs/demo_t2v.mp4, demo_i2v.mp4, demo_first.png and demo.png
"""

import logging
from pathlib import Path

import numpy as np
from tiny.world import Scene, render, scene_table, to_pixels

from disagg_ray import Pipeline, Request, Result
from disagg_ray.media.video import encode_png, load_video
from disagg_ray.report.tables import print_result

OUTPUT = Path("outputs")
PROMPT = "a large red circle moves left quickly on a white background"
FIRST = Scene("blue", "black", "triangle", "up", "large", "quickly")
FIRST_PROMPT = "a large blue triangle moves up quickly on a black background"


def generate(config: str, request: Request, name: str) -> Result:
    with Pipeline.from_config(config) as pipeline:
        result = pipeline.generate(request)
        print_result(result, pipeline.weights, pipeline.pools)
    result.save(OUTPUT / name)
    return result


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    OUTPUT.mkdir(exist_ok=True)
    clips, _ = render(scene_table([FIRST]))
    first = to_pixels(clips)[0, 0].numpy()
    (OUTPUT / "demo_first.png").write_bytes(encode_png(first.astype(np.float32) / 255))
    generate("conf/tiny_t2v.yaml", Request(PROMPT, seed=7), "demo_t2v.mp4")
    generate("conf/tiny_i2v.yaml", Request(FIRST_PROMPT, image=OUTPUT / "demo_first.png", seed=7), "demo_i2v.mp4")
    rows = [np.concatenate(list(load_video(OUTPUT / f"demo_{task}.mp4")[::4]), axis=1) for task in ("t2v", "i2v")]
    (OUTPUT / "demo.png").write_bytes(encode_png(np.concatenate(rows).astype(np.float32) / 255))
    print(f"wrote {OUTPUT}/demo_t2v.mp4, demo_i2v.mp4 and demo.png, which shows every fourth frame of both")


if __name__ == "__main__":
    main()
