"""`python -m edgetune_runtime` runs `edgetune-run`."""

import sys

from .cli import main

sys.exit(main())
