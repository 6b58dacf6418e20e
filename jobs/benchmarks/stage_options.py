"""The options of each stage that `bench.py stage` measures, by the name of the case."""

from __future__ import annotations

D, V = "stages.transformer.denoiser", "stages.decoder.vae"
AUTO, COMPILE = f"{D}.attention=auto", f"{D}.compile=default"
LAST, FUSE, TUNE = f"{V}.channels_last=true", f"{V}.compile=true", f"{V}.autotune=true"
BF16, FP16 = "stages.decoder.dtype=bfloat16", "stages.decoder.dtype=float16"
CACHE = f"{D}.step_cache"

MAIN = {
    "off": (),
    "compile": (COMPILE,),
    "attention auto": (AUTO,),
    "attention auto, compile": (AUTO, COMPILE),
}
OTHERS = {
    "attention _native_flash": (f"{D}.attention=_native_flash",),
    "attention _native_cudnn": (f"{D}.attention=_native_cudnn",),
    "fp8 storage": (f"{D}.quantization=fp8_storage",),
    "fp8": (f"{D}.quantization=fp8",),
    "fp8, compile": (f"{D}.quantization=fp8", COMPILE),
    "compile max-autotune": (f"{D}.compile=max-autotune-no-cudagraphs",),
}
WHOLE = {
    "first_block 0.5": (f"{CACHE}.method=first_block", f"{CACHE}.threshold=0.5"),
    "first_block 0.05": (f"{CACHE}.method=first_block",),
    "first_block 0.1": (f"{CACHE}.method=first_block", f"{CACHE}.threshold=0.1"),
    "first_block 0.1, compile": (f"{CACHE}.method=first_block", f"{CACHE}.threshold=0.1", COMPILE),
    "sea 0.25": (f"{CACHE}.method=sea",),
    "mag, ratios of 1": (f"{CACHE}.method=mag", f"{CACHE}.ratios=[{','.join(20 * ['1.0'])}]"),
    "taylorseer 5": (f"{CACHE}.method=taylorseer",),
    "taylorseer 2": (f"{CACHE}.method=taylorseer", f"{CACHE}.interval=2"),
    "offload group": ("stages.transformer.offload=group",),
    "offload model": ("stages.transformer.offload=model",),
}
DECODES = {
    "off": (),
    "bf16": (BF16,),
    "bf16, channels last": (BF16, LAST),
    "bf16, channels last, compile": (BF16, LAST, FUSE),
    "fp16, channels last, compile": (FP16, LAST, FUSE),
    "fp16, compile": (FP16, FUSE),
    "fp16, channels last, compile, autotune": (FP16, LAST, FUSE, TUNE),
    "fp32, tiles": (f"{V}.tile_pixels=0",),
}
