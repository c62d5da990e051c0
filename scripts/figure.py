#!/usr/bin/env python3
"""`kfacrnn figure` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["figure", *sys.argv[1:]]))
