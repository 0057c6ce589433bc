// What the CUDA library was built for, for `dllm info`.
#include <string>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

namespace dllm {

std::string cuda_archs_built() { return DLLM_CUDA_ARCH_LIST; }
int64_t cuda_runtime_built() { return CUDART_VERSION; }

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("cuda_archs_built() -> str");
  m.def("cuda_runtime_built() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs_built", TORCH_BOX(&dllm::cuda_archs_built));
  m.impl("cuda_runtime_built", TORCH_BOX(&dllm::cuda_runtime_built));
}
