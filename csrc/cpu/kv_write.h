// kv_write_ on the CPU: one work item is a kv head, so that of two tokens written to one slot the later
// one stays, for any number of threads.
#pragma once

#include "core/params.h"
#include "cpu/isa.h"

DLLM_CPU_KERNEL(kv_write, KvWriteParams)
