"""`python -m edgetune_runtime` is `edgetune-run`."""

import sys

from .cli import main

sys.exit(main())
