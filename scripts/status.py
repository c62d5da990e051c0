#!/usr/bin/env python3
"""`kfacrnn status` as a script."""

import sys

from kfacrnn.cli import main

if __name__ == "__main__":
    sys.exit(main(["status", *sys.argv[1:]]))
