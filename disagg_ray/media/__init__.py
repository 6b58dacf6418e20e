"""Images in, videos out, and where they are written.

The only importers of imageio, Pillow and fsspec. Images enter untrusted and leave as upright RGB; frames leave as files
that were read back; outputs are written whole or not at all.
"""
