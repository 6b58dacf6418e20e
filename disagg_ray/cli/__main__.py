"""`python -m disagg_ray.cli`."""

import sys

from disagg_ray.cli.command import main

sys.exit(main())
