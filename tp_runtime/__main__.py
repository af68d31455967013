"""``python -m tp_runtime``: see ``cli``."""

import sys

from .cli import main

sys.exit(main())
