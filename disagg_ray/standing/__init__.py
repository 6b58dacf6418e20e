"""Pipelines that outlive a driver and are shared by many."""
