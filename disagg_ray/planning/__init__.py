"""Measures a model's stages on one GPU, and predicts the memory and throughput of layouts on other clusters."""
