// Whether DLLM_DEBUG=1 asks the CUDA bindings to check what is slow to check.
#pragma once

#include <cstdlib>
#include <string_view>

namespace dllm {

inline bool debugging() {
  const char* value = std::getenv("DLLM_DEBUG");
  return value && std::string_view(value) == "1";
}

}  // namespace dllm
