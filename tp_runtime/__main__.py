"""``python -m tp_runtime``: see ``cli``."""

import io
import sys

from .tools.cli import main

if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
sys.exit(main())
