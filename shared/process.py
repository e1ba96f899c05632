"""Child processes that do not outlive their parent."""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, signal_number: int) -> None:
    """Has this process signalled when the thread that started it ends, on Linux.

    Args:
        parent: the starting process, whose end may come before the call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal_number)
