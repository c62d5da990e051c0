"""The entry of a run that a sweep started: `kfacrnn`, which stops with a checkpoint once its launcher is gone.

The launcher holds the other end of standard input and never writes: reading returns only when that end is closed, which
the kernel does however the launcher ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from kfacrnn.cli import main


def _stop_with_launcher() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_launcher, daemon=True).start()
    sys.exit(main())
