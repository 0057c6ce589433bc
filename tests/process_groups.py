"""The end of a test's process that shared a gloo group with others."""

from torch import distributed

from dllm_train.process_group import end_process


def end_together() -> None:
    """Wait for the other ranks, then end: whoever is first would take its connections from the others."""
    distributed.barrier()
    end_process()
