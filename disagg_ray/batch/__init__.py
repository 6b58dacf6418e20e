"""Many requests from a file: checked, resumed, run, recorded in a manifest."""
