#!/bin/sh
# Removes from the image's environment what nothing there uses: tests, Java, benchmarks, what only linkers read, pip.
set -eu
cd "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm -rf torch/test torch/bin/protoc* ray/jars mooncake/*bench*
find . -name '*.a' -delete
pip uninstall --yes --quiet pip
