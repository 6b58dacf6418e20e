"""A process that lives long gives back what it no longer uses."""

import subprocess
import sys

CODE = """
import threading, psutil
from disagg_ray.memory import trim

def rss():
    return psutil.Process().memory_info().rss

def fill(kept):
    pieces = [bytearray(2000) for _ in range(50_000)]
    kept.append(pieces[-1])  # the last one keeps the heap below it from shrinking by itself

kept = []
threads = [threading.Thread(target=fill, args=(kept,)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
before = rss()
trim()
print(before - rss())
"""


def test_what_threads_freed_goes_back_to_the_system() -> None:
    output = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert int(output) > 50 * 2**20
