// Rotary position embedding [Su et al. 2021] in the layout of GPT-NeoX: a head's halves are rotated against
// each other.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

// Work items: positions of sequences, batch · length. Fills query_out and key_out.
DLLM_CPU_KERNEL(rotate_half, RotateHalfParams)
