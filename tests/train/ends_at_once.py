"""Leaves a collective in flight whose tensor Python owns, and a reference to the group; run by torchrun."""

import atexit
import sys
import threading
import time
from pathlib import Path

import torch
from torch import distributed

from dllm_train.process_group import end_process


def main(folder):
    distributed.init_process_group("gloo")
    rank, main.group = distributed.get_rank(), distributed.group.WORLD

    def at_exit():
        for _ in range(3):
            main.group.allreduce([torch.ones(200_000)])
        (folder / f"exit handler {rank}").touch()

    atexit.register(at_exit)
    threading.Thread(target=lambda: (time.sleep(0.2), (folder / f"thread {rank}").touch())).start()
    end_process()
    raise AssertionError("the process goes on")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
