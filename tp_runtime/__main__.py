"""``python -m tp_runtime``: see ``cli``."""

import sys

from .tools.cli import main

sys.exit(main())
