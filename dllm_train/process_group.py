"""The end of a process that worked with others through torch.distributed."""

from __future__ import annotations

import atexit
import os
import sys
import threading

from torch import distributed


def end_process() -> None:
    """If this process is in a process group, leave it and end the process with code 0; else do nothing.

    Exit handlers run, threads are joined and output is written, but Python does not shut down: a thread
    of gloo that frees a tensor of its last collective then would abort the process with "terminate called
    without an active exception", and launchers would count it as failed. Leaving the group does not end its
    threads, since modules of torch and DeepSpeed that were imported while it stood refer to it in default
    arguments.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    distributed.destroy_process_group()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
