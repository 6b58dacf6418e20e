"""Many requests from a file, their videos into a folder."""
