// The product of a gated MLP: silu(gate) · up [Shazeer 2020].
#pragma once

#include "core/params.h"
#include "cpu/isa.h"
#include "cpu/row_items.h"

// Work items: rows_per_item(width) rows. Fills out.
DLLM_CPU_KERNEL(silu_mul, SiluMulParams)
// The same items. Fills grad_gate and grad_up.
DLLM_CPU_KERNEL(silu_mul_backward, SiluMulParams)
