"""`python -m edgetune` runs `edgetune`."""

import sys

from .cli.main import main

sys.exit(main())
