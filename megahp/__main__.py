"""`python -m megahp` is the megahp command."""

import sys

from megahp.cli import main

sys.exit(main())
