"""`python -m kfacrnn`."""

import sys

from kfacrnn.cli import main

sys.exit(main())
