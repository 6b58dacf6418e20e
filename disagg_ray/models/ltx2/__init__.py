"""LTX-2: video with sound, of a text, and of a first frame where a request gives one."""

from disagg_ray.models.family import Component, Family, Task, euler_scheduler, tokenizer
from disagg_ray.models.ltx2.component_configs import (
    AudioVaeConfig,
    ConnectorsConfig,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
    VocoderConfig,
)

FAMILY = Family(
    name="ltx2",
    title="LTX-2",
    tasks={
        "ti2v": Task(
            optional_images=("image",),
            others=(
                "modality_scale", "audio_modality_scale", "stg_scale", "audio_stg_scale", "stg_block",
                "guidance_rescale", "audio_guidance_rescale",
            ),
            multiple=32,
            least_side=64,  # its VAE mirrors the latents at the sides, and mirrors none of one
            frames_step=8,
            least_steps=2,
            step_caches=(),
            sound_rate=25.0,
        )
    },
    pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline"),
    components={
        "tokenizer": tokenizer("GemmaTokenizer"),
        "text_encoder": Component("transformers", ("Gemma3ForConditionalGeneration",)),
        "connectors": Component(
            "diffusers", ("LTX2TextConnectors",), values=ConnectorsConfig, module="ltx2", dtype_of="text_encoder"
        ),
        "vae": Component("diffusers", ("AutoencoderKLLTX2Video",), values=VaeConfig),
        "audio_vae": Component("diffusers", ("AutoencoderKLLTX2Audio",), values=AudioVaeConfig, dtype_of="vae"),
        "vocoder": Component("diffusers", ("LTX2Vocoder",), values=VocoderConfig, module="ltx2", dtype_of="vae"),
        "scheduler": euler_scheduler(SchedulerConfig),
        "transformer": Component("diffusers", ("LTX2VideoTransformer3DModel",), values=TransformerConfig),
    },
    shifts_by_size=True,
    without=(
        "model.flow_shift", "model.scheduler", "stages.parallel",
        "stages.offload", "stages.denoiser.attention", "stages.denoiser.compile", "stages.denoiser.fuse",
        "stages.denoiser.loras", "stages.denoiser.quantization", "stages.vae.compile", "stages.vae.channels_last",
        "stages.vae.tile_pixels",
    ),
)  # fmt: skip
