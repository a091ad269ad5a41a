"""``python -m app`` is ``mamba-serve``."""

import sys

from app.cli import main

sys.exit(main())
