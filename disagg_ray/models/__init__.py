"""The cut of a diffusers modular pipeline into stages: the only package that imports diffusers and transformers."""

from disagg_ray import environment

environment.default("TRANSFORMERS_VERBOSITY", "error")  # both warn while they are imported
environment.default("DIFFUSERS_VERBOSITY", "critical")  # logs each exception once a nested block; ours say it once
