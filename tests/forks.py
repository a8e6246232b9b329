"""Work in a fork of the present process, which may be killed."""

import os
import sys


def forked(work) -> int:
    """Exit status of `work` in a child; minus the signal if one ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
