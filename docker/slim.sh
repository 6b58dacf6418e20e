#!/bin/sh
# Removes from the image's environment what nothing there uses: tests, Java, benchmarks, pip.
set -eu
cd "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
rm -rf torch/test ray/jars mooncake/*bench*
pip uninstall --yes --quiet pip
