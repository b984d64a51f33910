"""`petal-swarm` that ends with the program that started it, however that one ends.

The starter holds the other end of stdin, and the kernel closes it even after `kill -9`. Works on every
system, where the signal that Linux sends when a parent dies does not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from petal_swarm.cli import main as programs

GRACE_S = 5.0


def main(argv: list[str] | None = None) -> int:
    threading.Thread(target=_leave_with_starter, name="tether", daemon=True).start()
    return programs.main(argv)


def _leave_with_starter() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # the daemon, too
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
