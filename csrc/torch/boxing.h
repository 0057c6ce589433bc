// As TORCH_BOX, for functions some of whose parameters are structs that stand for several arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "torch/checks.h"

namespace dllm {

// The arguments of an operator, taken one after another; whoever takes one owns it.
class ArgumentStack {
 public:
  explicit ArgumentStack(const StableIValue* next) : next_(next) {}

  // A struct of several says how it is put together: static T from(ArgumentStack&).
  template <class T>
  T take() {
    if constexpr (requires(ArgumentStack& stack) { T::from(stack); }) return T::from(*this);
    else return torch::stable::detail::to<T>(*next_++);
  }

 private:
  const StableIValue* next_;
};

template <auto function>
struct Boxed;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* values, uint64_t, uint64_t) {
    ArgumentStack stack(values);
    std::tuple<std::decay_t<Parameters>...> arguments{stack.take<std::decay_t<Parameters>>()...};
    Result result = std::apply(function, arguments);
    if constexpr (std::is_same_v<Result, Tensor>) values[0] = torch::stable::detail::from(result);
    else torch::stable::detail::box_from_tuple(values, result);
  }
};

#define DLLM_BOX(function) (&dllm::Boxed<&function>::call)

}  // namespace dllm
