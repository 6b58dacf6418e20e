"""What is reported while requests run: events, the encrypted channel that carries them, and who displays them.

The only importer of ZeroMQ and msgpack. Events are small, lossy and never slow a stage; what a socket receives is
untrusted until `events.unpack` has checked it.
"""
