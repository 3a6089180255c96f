"""``python -m kwslib`` is ``kws``."""

import sys

from kwslib.cli import main

sys.exit(main())
