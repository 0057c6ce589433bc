// Which tensors share memory. An operator that writes in place must not change what it goes on reading: it
// has checked positions, pages and ids before the first write.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <vector>

#include "torch/checks.h"

namespace dllm {

// The integers stride · n, 0 <= n <= most, with a positive stride.
struct Multiples {
  int64_t stride, most;
};

// Whether one multiple of each term can add up to something in [low, high]. Tensors whose strides nest, as
// those of views do, take a few steps; what takes too many counts as possible.
class SumSearch {
 public:
  explicit SumSearch(std::vector<Multiples> terms) : terms_(std::move(terms)) {
    std::sort(terms_.begin(), terms_.end(),
              [](const Multiples& a, const Multiples& b) { return a.stride > b.stride; });
    rest_.assign(terms_.size() + 1, 0);
    for (size_t i = terms_.size(); i-- > 0;) rest_[i] = rest_[i + 1] + terms_[i].stride * terms_[i].most;
  }
  bool reaches(int64_t low, int64_t high) { return reaches(0, low, high); }

 private:
  static constexpr int kMostSteps = 10000;

  bool reaches(size_t i, int64_t low, int64_t high) {
    if (high < 0 || low > rest_[i]) return false;
    if (low <= 0 || ++steps_ > kMostSteps) return true;
    const auto& [stride, most] = terms_[i];
    const int64_t missing = low - rest_[i + 1];
    const int64_t least = missing > 0 ? (missing - 1) / stride + 1 : 0;
    for (int64_t n = std::min(most, high / stride); n >= least; n--)
      if (reaches(i + 1, low - n * stride, high - n * stride)) return true;
    return false;
  }

  std::vector<Multiples> terms_;
  std::vector<int64_t> rest_;  // what the terms from i on add up to at most
  int steps_ = 0;
};

// A tensor's bytes: elements at begin + Σ strideᵢ·nᵢ, all of them in [begin, end).
struct Footprint {
  int64_t begin = 0, end = 0, element = 0;

  explicit Footprint(const Tensor& tensor) {
    if (tensor.numel() == 0) return;
    element = static_cast<int64_t>(tensor.element_size());
    begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
    end = begin + element;
    for (int64_t dim = 0; dim < tensor.dim(); dim++)
      end += tensor.stride(dim) * (tensor.size(dim) - 1) * element;
  }
  bool meets(const Footprint& other) const { return begin < other.end && other.begin < end; }
};

// The terms of a tensor's offsets, in units of `unit` bytes an element; dimensions of one stride are one
// term.
inline void add_terms(std::vector<Multiples>& terms, const Tensor& tensor, int64_t unit) {
  for (int64_t dim = 0; dim < tensor.dim(); dim++) {
    const int64_t stride = tensor.stride(dim) * unit, most = tensor.size(dim) - 1;
    if (most == 0 || stride == 0) continue;
    const auto same = std::find_if(terms.begin(), terms.end(),
                                   [&](const Multiples& term) { return term.stride == stride; });
    if (same == terms.end()) terms.push_back({stride, most});
    else same->most += most;
  }
}

// Whether two tensors have a byte in common. With the places of b counted from its last element backwards,
// that is whether offsets of both add up to the distance from the first element of a to the last of b.
inline bool share_memory(const Tensor& a, const Tensor& b) {
  const Footprint left(a), right(b);
  if (!left.meets(right)) return false;
  std::vector<Multiples> terms;
  add_terms(terms, a, left.element);
  add_terms(terms, b, right.element);
  const int64_t distance = right.end - right.element - left.begin;
  return SumSearch(terms).reaches(distance - left.element + 1, distance + right.element - 1);
}

// Whether two elements of a tensor lie in one place: whether, of the dimensions in descending stride, the
// first in which they differ by 1 or more can be made up for by those after it.
inline bool overlaps_itself(const Tensor& tensor) {
  std::vector<Multiples> dims;
  for (int64_t dim = 0; dim < tensor.dim(); dim++) {
    if (tensor.numel() == 0 || tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) == 0) return true;
    dims.push_back({tensor.stride(dim), tensor.size(dim) - 1});
  }
  std::sort(dims.begin(), dims.end(),
            [](const Multiples& a, const Multiples& b) { return a.stride > b.stride; });
  int64_t reach = 0;  // of the dimensions after this one
  for (size_t i = dims.size(); i-- > 0;) {
    const auto [stride, most] = dims[i];
    if (stride <= reach) {
      std::vector<Multiples> terms{{stride, most - 1}};
      for (size_t after = i + 1; after < dims.size(); after++)
        terms.push_back({dims[after].stride, 2 * dims[after].most});
      if (SumSearch(terms).reaches(reach - stride, reach - stride)) return true;
    }
    reach += stride * most;
  }
  return false;
}

// An argument and its name; absent where an optional one is.
struct Argument {
  const char* name;
  const Tensor* tensor;
  Argument(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Argument(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor ? &*tensor : nullptr) {}
};

// Of an operator that writes in place: what it writes overlaps neither itself nor any other argument.
inline void check_written(const char* op, std::vector<Argument> written, const std::vector<Argument>& read) {
  std::erase_if(written, [](const Argument& argument) { return !argument.tensor; });
  std::vector<Argument> arguments = written;
  std::copy_if(read.begin(), read.end(), std::back_inserter(arguments),
               [](const Argument& argument) { return argument.tensor; });
  std::vector<Footprint> footprints;
  for (const Argument& argument : arguments) footprints.emplace_back(*argument.tensor);
  for (size_t i = 0; i < written.size(); i++) {
    const auto& [name, tensor] = written[i];
    if (overlaps_itself(*tensor))
      check(false, op, ": ", name,
            " is written and must not overlap itself, as an expanded tensor does; got ", "shape ",
            shape_text(*tensor), " and strides ", strides_text(*tensor));
    for (size_t j = i + 1; j < arguments.size(); j++)
      check(!footprints[i].meets(footprints[j]) || !share_memory(*tensor, *arguments[j].tensor), op, ": ",
            name, " is written and must not share memory with ", arguments[j].name, "; clone one of them");
  }
}

}  // namespace dllm
