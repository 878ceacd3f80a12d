"""Ties a process to the one that started it, so that a kill -9 of the parent leaves nothing running.

This file is also the small program that does so: it asks the kernel for a signal at the parent's death, then becomes
the command. A program of its own rather than a `preexec_fn`, which may deadlock where the parent has threads.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str], at_parents_death: signal.Signals) -> list[str]:
    """Return *command* prefixed so that it gets the signal when this process dies.

    The process keeps its id across the leash, so the signals sent to it reach the command. Linux counts the death of
    the *thread* that started it, so start from one that lives on. Elsewhere the command runs without a leash.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(at_parents_death)), *command]


def _become(parent: int, at_parents_death: int, command: list[str]) -> NoReturn:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(at_parents_death))
    if os.getppid() != parent:
        sys.exit("the parent died before its child began")  # and so sent no signal
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and a command would inherit that
    os.execvp(command[0], command)  # noqa: S606 - becoming the command is the point


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
