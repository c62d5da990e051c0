#!/usr/bin/env python3
"""`kfacrnn data` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
