"""`import dllm_kernels` is cheap, and its names are found on first use."""

import subprocess
import sys

import pytest

import dllm_kernels


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, dllm_kernels; dir(dllm_kernels); dllm_kernels.__version__;"
        "print(sorted({'torch', 'numpy', 'transformers', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_dir_lists_every_public_name():
    assert set(dllm_kernels.__all__) <= set(dir(dllm_kernels))
    assert {"SpanMask", "linear_token_stats", "commit_", "sample"} <= set(dllm_kernels.__all__)


def test_a_name_is_looked_up_once():
    from dllm_kernels.span_mask import SpanMask

    assert dllm_kernels.SpanMask is SpanMask
    assert vars(dllm_kernels)["SpanMask"] is SpanMask


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dllm_kernels' has no attribute 'samples'"):
        dllm_kernels.samples  # noqa: B018


@pytest.mark.parametrize("name", dllm_kernels.__all__)
def test_every_listed_name_exists(name):
    assert getattr(dllm_kernels, name) is not None
