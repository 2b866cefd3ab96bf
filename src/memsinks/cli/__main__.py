"""``python -m memsinks.cli``: the command line."""

import sys

from memsinks.cli import main

sys.exit(main())
