"""Wan's own: its blocks where diffusers' differ, decoding in tiles, shapes, and random checkpoints."""
