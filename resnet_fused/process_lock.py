"""A lock that is of one process, and of none that is forked from it."""

from __future__ import annotations

import os
import threading


class ProcessLock:
    """``with lock.here():`` as with a ``threading.Lock``, but a forked child finds it open.

    What another thread of the parent held it for that thread will never end in the child.
    """

    def __init__(self) -> None:
        self._locks: dict[int, threading.Lock] = {}

    def here(self) -> threading.Lock:
        """This process's lock."""
        return self._locks.setdefault(os.getpid(), threading.Lock())
