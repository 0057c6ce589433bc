// KL(p ‖ q) of the softmax distributions of two rows of logits.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

// Work items: rows.
DLLM_CPU_KERNEL(token_divergence, TokenDivergenceParams<TokenIds>)
