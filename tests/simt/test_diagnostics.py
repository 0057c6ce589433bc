"""Wrong kernels are diagnosed, with kernel, thread and source line; right ones are not."""

import ctypes
import re

import pytest
import simt
import torch

ORDERS = [0, 1, 2, 3]  # forward, backward, shuffled twice

WRONG = {
    "unwritten_read": "read of 4 bytes at offset [12][0-9]{2} of dynamic shared memory that no thread wrote",
    "unwritten_static_read": "thread .63, .*: read of 4 bytes of a __shared__ variable that no thread wrote",
    "out_of_range": "thread .63, 0, 0.: write .* at offset 256 .* goes beyond the 256 bytes of the launch",
    "missing_barrier": "(read|write) .* races with a (read|write) by thread [0-9]+: no barrier lies between",
    "overwritten_too_early": "(read|write) .* races with a (read|write) by thread [0-9]+",
    "missing_warp_barrier": "(read|write) .* races with a (read|write) by thread [0-9]+",
    "barrier_of_the_wrong_warps": "read .* (races with a write|that no thread wrote)",
    "atomics_and_a_plain_read": "races with a(n atomic operation| read) by thread [0-9]+",
    "missing_wait": "asynchronous copy is still on its way to: wait_copies.. is missing",
    "wait_for_the_wrong_group": "asynchronous copy is still on its way to: wait_copies.. is missing",
    "missing_barrier_after_wait": "races with a write|that no thread wrote|asynchronous copy",
    "copied_over_what_is_read": "races with a (read|write)|asynchronous copy is still on its way",
    "barrier_for_some": "threads 0-39 wait at __syncthreads .*; threads 40-63 have exited|"
    "threads 40-63 have exited; threads 0-39 wait at __syncthreads",
    "divergent_barriers": "divergent barriers: this thread is at __syncthreads, [0-9]+ others at __sync",
    "crossed_barriers": "nothing can go on: threads [0-9-]+ wait at sync_threads",
    "half_warp_shuffle": "threads 0-15, 32-47 wait at __shfl_xor_sync",
    "two_collectives": "divergent warp: this lane is at __(ballot|shfl_xor)_sync of lanes 0xffffffff, others",
    "shuffle_from_outside": "__shfl_xor_sync reads lane [0-9]+, which is not among lanes 0x0000ffff",
    "misaligned_shared": "access of '(struct )?float4' at an address that is 4 bytes off a multiple of 16",
    "misaligned_global": "access of 'struct float2' at an address that is 4 bytes off a multiple of 8",
    "beyond_a_tensor": "access of global memory [0-9]+ bytes after a tensor of 256 bytes",
    "before_a_tensor": "access of global memory [0-9]+ bytes before a tensor of 256 bytes",
    "beyond_an_array": r"index [4-7] of 'float \[4\]' is out of bounds",
    "trap": "thread .5, 0, 0.: __trap",
}
# Tensors end at a page that must not be touched; in the backward order they begin at one.
ORDERS_OF = {"beyond_a_tensor": [0, 2, 3], "before_a_tensor": [1]}
RIGHT = ["narrow_neighbours", "pipeline", "producer_and_consumer", "half_warps"]


def diagnose(kernel: str, order: int) -> str:
    library = simt.library()
    library.diagnose.restype = ctypes.c_char_p
    with simt.in_place_of_cpu(order):
        out = torch.ones(64)
        return library.diagnose(kernel.encode(), ctypes.c_void_p(out.data_ptr())).decode()


@pytest.mark.parametrize(
    "kernel, order", [(kernel, order) for kernel in WRONG for order in ORDERS_OF.get(kernel, ORDERS)]
)
def test_a_wrong_kernel_is_diagnosed(kernel, order):
    text = diagnose(kernel, order)
    assert re.search(WRONG[kernel], text), text
    assert f"::{kernel}" in text and re.search(r"tests/simt/diagnostics\.cu:\d+", text)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", RIGHT)
def test_a_right_kernel_is_not(kernel, order):
    assert diagnose(kernel, order) == ""


@pytest.mark.parametrize(
    "threads, blocks_y, shared, asked, status",
    [
        (1024, 65535, 0, False, "cudaSuccess"),
        (1025, 1, 0, False, "cudaErrorInvalidConfiguration"),
        (32, 65536, 0, False, "cudaErrorInvalidConfiguration"),
        (32, 0, 0, False, "cudaErrorInvalidConfiguration"),
        (32, 1, 48 * 1024, False, "cudaSuccess"),
        (32, 1, 48 * 1024 + 1, False, "cudaErrorInvalidValue"),
        (32, 1, 227 * 1024, True, "cudaSuccess"),
        (32, 1, 227 * 1024 + 1, True, "cudaErrorInvalidValue"),
    ],
)
def test_launches_keep_to_the_limits_of_a_device(threads, blocks_y, shared, asked, status):
    library = simt.library()
    library.launch_status.restype = ctypes.c_char_p
    assert library.launch_status(threads, blocks_y, shared, asked).decode() == status
