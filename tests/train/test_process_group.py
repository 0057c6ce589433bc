"""Processes that worked together end with code 0, whatever their threads still do."""

from dllm_train.process_group import end_process
from tests.train.trainer_runs import on_two_ranks


def test_a_thread_at_work_aborts_nothing(tmp_path):
    on_two_ranks("tests.train.ends_at_once", tmp_path)
    names = {f"{what} {rank}" for what in ("exit handler", "thread") for rank in (0, 1)}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_a_process_alone_goes_on():
    assert end_process() is None
