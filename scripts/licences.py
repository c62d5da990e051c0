"""Prints docs/licences.md: every package that `make install` installs, with the licence that it declares.

Reads what is installed, nothing else; a package that is not installed here is said to be so.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

HEAD = """\
# Licences of what is installed

kfacrnn is Apache-2.0. The library itself needs torch; everything else comes with an extra of pyproject.toml. This is
what each package of constraints.txt declares in its own metadata, as `python scripts/licences.py` prints it; CUDA's
libraries, which come with some builds of torch, are NVIDIA's, under its own terms.

| package | version | licence |
|---|---|---|"""


def licence(name: str) -> str:
    """As the package declares it: an SPDX expression, else its classifiers, else the first line of its field."""
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed here"
    classifiers = [text.rpartition(" :: ")[2] for text in said.get_all("Classifier") or [] if "License ::" in text]
    own = [word for word in classifiers if word != "OSI Approved"]
    return said.get("License-Expression") or "; ".join(own) or (said.get("License") or "none").split("\n", 1)[0]


def main() -> None:
    pins = re.findall(r"^([^#\s=]+)==(\S+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    print(HEAD)
    for name, version in pins:
        print(f"| {name} | {version} | {licence(name)} |")


if __name__ == "__main__":
    main()
