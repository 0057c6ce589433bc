// Marks functions that both the host compiler and nvcc compile. Always inlined on the host: CPU kernels
// are compiled once per instruction set, and an out-of-line copy could be shared between them.
#pragma once

#ifdef __CUDACC__
#define DLLM_HOST_DEVICE __host__ __device__ inline
#else
#define DLLM_HOST_DEVICE inline __attribute__((always_inline))
#endif
