#!/usr/bin/env python3
"""`kfacrnn list` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["list", *sys.argv[1:]]))
