"""Command line in, exit code out: `python -m edgetune` is `edgetune`."""

import sys

from .cli.main import main

sys.exit(main())
