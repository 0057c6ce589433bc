// Dynamic shared memory of the kernels that have any, from the constants that their launches read, for
// cuda_gates.py: lines of KERNEL<NUMBERS OF THE TEMPLATE> BYTES, on a GPU that gives a CTA argv[1] bytes.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/block_attention/config.h"
#include "cuda/block_attention/sm90/config.h"
#include "cuda/cached_attention/config.h"
#include "cuda/commit/config.h"
#include "cuda/cross_entropy/config.h"
#include "cuda/linear_token_stats/sm90/config.h"

namespace dllm::cuda {
namespace {

void plan(const std::string& kernel, size_t bytes) { std::printf("%s %zu\n", kernel.c_str(), bytes); }

std::string of(const char* kernel, int number) {
  return std::string(kernel) + "<" + std::to_string(number) + ">";
}

template <int kDim>
void plans_of_ampere() {
  const std::string dim = std::to_string(kDim);
  plan(of("forward_kernel", kDim), ForwardTiles<kDim>::kSharedBytes);
  plan(of("query_gradients_kernel", kDim), QueryGradientTiles<kDim>::kSharedBytes);
  plan(of("key_gradients_kernel", kDim), KeyGradientTiles<kDim>::kSharedBytes);
  plan(of("plain_forward_kernel", kDim), kPlainForwardBytes<kDim>);
  plan(of("plain_query_gradients_kernel", kDim), kPlainBackwardBytes<kDim>);
  plan(of("plain_key_gradients_kernel", kDim), kPlainBackwardBytes<kDim>);
  plan("cached_tiles_kernel<" + dim + ",0>", CachedTiles<kDim, false>::kSharedBytes);
  plan("cached_tiles_kernel<" + dim + ",1>", CachedTiles<kDim, true>::kSharedBytes);
}

template <int kDim>
void plans_of_hopper() {
  plan(of("sm90::forward_kernel", kDim), sm90::ForwardTiles<kDim>::kSharedBytes);
  plan(of("sm90::query_gradients_kernel", kDim), sm90::QueryGradientTiles<kDim>::kSharedBytes);
  plan(of("sm90::key_gradients_kernel", kDim), sm90::KeyGradientTiles<kDim>::kSharedBytes);
}

template <int kRows>
void plan_of_linear_stats() {
  plan(of("sm90::linear_states_kernel", kRows), sm90::LinearStatsTiles<kRows>::kSharedBytes);
}

void print_plans(int64_t limit) {
  plans_of_ampere<64>();
  plans_of_ampere<128>();
  plans_of_ampere<256>();
  plans_of_hopper<64>();
  plans_of_hopper<128>();
  plan_of_linear_stats<8>();
  plan_of_linear_stats<16>();
  plan_of_linear_stats<32>();
  plan_of_linear_stats<64>();
  plan("commit_kernel", commit_shared_bytes(kMaxCandidates, true));
  plan("cross_entropy_in_place_kernel", resident_bytes(INT64_MAX / 2, limit));
}

}  // namespace
}  // namespace dllm::cuda

int main(int, char** arguments) { dllm::cuda::print_plans(std::atoll(arguments[1])); }
