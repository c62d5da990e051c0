#!/usr/bin/env python3
"""`kfacrnn sweep` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
