// What was built and what was picked, for `dllm info`.
#include <string>

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"

namespace dllm {

std::string isas_built() { return DLLM_ISA_LIST; }
std::string isa_active() { return cpu::active_isa_name(); }
std::string isa_error() { return cpu::isa_error(); }

}  // namespace dllm

STABLE_TORCH_LIBRARY_FRAGMENT(dllm_kernels, m) {
  m.def("isas_built() -> str");
  m.def("isa_active() -> str");
  m.def("isa_error() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dllm_kernels, CompositeExplicitAutograd, m) {
  m.impl("isas_built", TORCH_BOX(&dllm::isas_built));
  m.impl("isa_active", TORCH_BOX(&dllm::isa_active));
  m.impl("isa_error", TORCH_BOX(&dllm::isa_error));
}
