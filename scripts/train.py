#!/usr/bin/env python3
"""`kfacrnn train` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
