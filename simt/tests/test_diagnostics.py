"""Wrong kernels are diagnosed, with kernel, thread and source line; right ones are not."""

import ctypes
import re

import pytest
import torch

import simt

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
    "missing_wait": "asynchronous copy is still on its way to: a wait is missing",
    "wait_for_the_wrong_group": "asynchronous copy is still on its way to: a wait is missing",
    "missing_barrier_after_wait": "races with a write|that no thread wrote|asynchronous copy",
    "copied_over_what_is_read": "races with a (read|write)|asynchronous copy is still on its way",
    "exit_without_wait": "thread 0 exits without waiting for 1 of its asynchronous copies",
    "barrier_for_some": "threads 0-39 wait at __syncthreads .*; threads 40-63 have exited|"
    "threads 40-63 have exited; threads 0-39 wait at __syncthreads",
    "divergent_barriers": "divergent barriers: this thread is at __syncthreads, [0-9]+ others at __sync",
    "crossed_barriers": "nothing can go on: threads [0-9-]+ wait at bar_sync",
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
WRONG_SM90 = {
    "missing_wait": "asynchronous copy is still on its way to: a wait is missing",
    "too_few_bytes_expected": "asynchronous copy is still on its way to: a wait is missing",
    "too_many_bytes_expected": "wait for a phase of parity 0 .*lacks 0 arrivals and 8 bytes",
    "wait_for_the_wrong_phase": "wait for a phase of parity 1 .*lacks 1 arrivals and 0 bytes",
    "missing_publication": "cp_async_bulk_tensor: fence_mbarrier_init.. is missing after mbarrier_init",
    "missing_initialisation": "(that no thread wrote|mbarrier_init was not called)",
    "barrier_used_before_all_may": "(that no thread wrote|races with)",
    "misaligned_box": "cp_async_bulk_tensor goes to multiples of 1024 bytes",
    "missing_fence": "what thread [0-9]+ wrote by ordinary stores: its fence_proxy_async.. is missing",
    "missing_beginning": "wgmma_fence.. is missing since the last wgmma_wait_group",
    "missing_wait_for_products": "warp [0-9] exits without wgmma_wait_group",
    "product_of_some_warps": "warps 0 and 3 of one warpgroup began different numbers of products",
    "registers_written_before_the_product": "registers of A were written after wgmma_fence",
    "registers_written_before_the_wait": "registers that a product reads were written before it was waited",
    "registers_that_nobody_gave": "nothing can go on: .*threads [0-9-, ]+ wait at setmaxnreg_inc",
    "registers_given_by_taking": "setmaxnreg_inc: a thread that holds 168 cannot take 160 in all",
    "buffer_released_too_early": "(asynchronous copy is still on its way|races with a)",
}
WRONG_OVERLAPPING = {
    "overlapping_without_wait": "an overlapping launch, which ends without griddepcontrol_wait",
    "overlapping_copy_before_wait": r"cp_async: griddepcontrol_wait\(\) is missing before it",
}
RIGHT = ["narrow_neighbours", "padding", "pipeline", "producer_and_consumer", "half_warps"]


def diagnose(
    kernel: str, order: int, family: str = "", size: int = 64, capability: int = 8
) -> tuple[str, torch.Tensor]:
    function = getattr(simt.library(), f"diagnose{family}")
    function.restype = ctypes.c_char_p
    with simt.in_place_of_cpu(order, capability):
        out = torch.ones(size)
        return function(kernel.encode(), ctypes.c_void_p(out.data_ptr())).decode(), out


@pytest.mark.parametrize(
    "kernel, order", [(kernel, order) for kernel in WRONG for order in ORDERS_OF.get(kernel, ORDERS)]
)
def test_a_wrong_kernel_is_diagnosed(kernel, order):
    text, _ = diagnose(kernel, order)
    assert re.search(WRONG[kernel], text), text
    assert f"::{kernel}" in text and re.search(r"simt/diagnostics\.cu:\d+", text)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", RIGHT)
def test_a_right_kernel_is_not(kernel, order):
    assert diagnose(kernel, order)[0] == ""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", WRONG_SM90)
def test_a_wrong_kernel_for_hopper_is_diagnosed(kernel, order):
    text, _ = diagnose(kernel, order, "_sm90", 64 * 64)
    assert re.search(WRONG_SM90[kernel], text), text
    assert f"::{kernel}" in text


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["registers_that_are_there", "registers_written_after_the_wait"])
def test_a_right_kernel_for_hopper_is_not(kernel, order):
    assert diagnose(kernel, order, "_sm90", 64 * 64)[0] == ""


def test_ctas_run_forward_backward_and_shuffled():
    orders = [diagnose("ctas_come_and_go", order)[1][1:9].tolist() for order in ORDERS]
    assert orders[0] == [*range(8)] and orders[1] == [*range(8)][::-1]
    assert all(sorted(order) == orders[0] for order in orders) and orders[2] not in (orders[0], orders[3])


@pytest.mark.parametrize("order", ORDERS)
def test_sums_of_products_are_there_after_the_wait_and_not_before(order):
    text, out = diagnose("sums_before_and_after_the_wait", order, "_sm90", 64 * 64)
    assert text == "" and out[:128].isnan().all() and (out[128:256] == 64).all()


@pytest.mark.parametrize("order", ORDERS)
def test_an_overlapping_launch_waits_for_the_one_before_it(order):
    for kernel, expected in WRONG_OVERLAPPING.items():
        assert re.search(expected, diagnose(kernel, order, capability=9)[0])
        assert diagnose(kernel, order, capability=8)[0] == ""  # no launch overlaps before Hopper
    assert diagnose("overlapping_copy_after_wait", order, capability=9)[0] == ""


NEVER, FOR_THIS_LAUNCH, AS_OUR_LAUNCHES_DO = range(3)


def launch_status(
    kernel="no_variables", threads=32, blocks_y=1, shared=0, asking=NEVER, capability: int = 9
) -> str:
    library = simt.library()
    library.launch_status.restype = ctypes.c_char_p
    library.simt_set_capability(capability)
    return library.launch_status(kernel.encode(), threads, blocks_y, shared, asking).decode()


@pytest.mark.parametrize(
    "threads, blocks_y, status",
    [
        (1024, 1, "cudaSuccess"),
        (32, 65535, "cudaSuccess"),
        (1025, 1, "cudaErrorInvalidConfiguration"),
        (32, 65536, "cudaErrorInvalidConfiguration"),
        (32, 0, "cudaErrorInvalidConfiguration"),
    ],
)
def test_launches_keep_to_the_shapes_of_a_device(threads, blocks_y, status):
    assert launch_status(threads=threads, blocks_y=blocks_y) == status


KILOBYTES = {"no_variables": 0, "a_kilobyte": 1, "a_kilobyte_of_a_function": 1}  # of static shared memory


@pytest.mark.parametrize("kernel", KILOBYTES)
def test_without_asking_static_and_dynamic_shared_memory_are_48_kilobytes_at_most(kernel):
    most = (48 - KILOBYTES[kernel]) * 1024
    assert launch_status(kernel, shared=most) == "cudaSuccess"
    assert launch_status(kernel, shared=most + 1) == "cudaErrorInvalidValue"


@pytest.mark.parametrize("capability, kilobytes", [(8, 99), (9, 227)])
@pytest.mark.parametrize("kernel", KILOBYTES)
def test_what_is_asked_for_counts_static_shared_memory_too(kernel, capability, kilobytes):
    on = dict(asking=FOR_THIS_LAUNCH, capability=capability)
    most = (kilobytes - KILOBYTES[kernel]) * 1024
    assert launch_status(kernel, shared=most, **on) == "cudaSuccess"
    assert launch_status(kernel, shared=most + 1, **on) == "cudaErrorInvalidValue"


@pytest.mark.parametrize("capability, kilobytes", [(8, 99), (9, 227)])
@pytest.mark.parametrize("kernel", ["no_variables", "a_kilobyte"])
def test_our_launches_may_have_all_that_a_device_gives(kernel, capability, kilobytes):
    """Whatever the launches before them had, also those that were too large."""
    on = dict(asking=AS_OUR_LAUNCHES_DO, capability=capability)
    most = (kilobytes - KILOBYTES[kernel]) * 1024
    for shared in (16, 48 * 1024, most, 47 * 1024, most):
        assert launch_status(kernel, shared=shared, **on) == "cudaSuccess", shared
    assert launch_status(kernel, shared=most + 1, **on) == "cudaErrorLaunchOutOfResources"
    assert launch_status(kernel, shared=most, **on) == "cudaSuccess"
