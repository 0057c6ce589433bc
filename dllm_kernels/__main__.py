"""`python -m dllm_kernels` is the `dllm` command."""

from dllm_kernels.cli import app

app(prog_name="dllm")
