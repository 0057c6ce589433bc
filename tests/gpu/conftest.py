"""Tests of this folder run on a GPU and are skipped without one; DLLM_REQUIRE_GPU=1 forbids skipping."""

import os
from pathlib import Path

import pytest

from dllm_kernels import _library


def pytest_collection_modifyitems(config, items):
    reason = _library.cuda_unavailable()
    if reason is None:
        return
    if os.environ.get("DLLM_REQUIRE_GPU"):
        pytest.exit(f"DLLM_REQUIRE_GPU is set, but {reason}", returncode=1)
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
