"""The cut of a diffusers modular pipeline into stages: the only package that imports diffusers and transformers."""
