// Dynamic shared memory of the kernels that have any, from the constants that their launches read, for
// cuda_gates.py: lines of KERNEL<NUMBERS OF THE TEMPLATE> BYTES, on a GPU that gives a CTA argv[1] bytes.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/block_attention/fp32/config.h"
#include "cuda/block_attention/sm80/config.h"
#include "cuda/block_attention/sm90/config.h"
#include "cuda/cached_attention/config.h"
#include "cuda/commit/config.h"
#include "cuda/cross_entropy/config.h"
#include "cuda/linear_token_stats/sm90/config.h"
#include "cuda/skinny_linear/sm80/config.h"
#include "cuda/skinny_linear/sm90/config.h"

namespace dllm::cuda {
namespace {

void plan(const std::string& kernel, size_t bytes) { std::printf("%s %zu\n", kernel.c_str(), bytes); }

std::string of(const char* kernel, int number) {
  return std::string(kernel) + "<" + std::to_string(number) + ">";
}

template <int kDim>
void plans_of_ampere() {
  const std::string dim = std::to_string(kDim);
  plan(of("sm80::forward_kernel", kDim), sm80::ForwardTiles<kDim>::kSharedBytes);
  plan(of("sm80::backward_dq_kernel", kDim), sm80::BackwardDqTiles<kDim>::kSharedBytes);
  plan(of("sm80::backward_dkv_kernel", kDim), sm80::BackwardDkvTiles<kDim>::kSharedBytes);
  plan(of("fp32::forward_kernel", kDim), fp32::kForwardBytes<kDim>);
  plan(of("fp32::backward_dq_kernel", kDim), fp32::kBackwardBytes<kDim>);
  plan(of("fp32::backward_dkv_kernel", kDim), fp32::kBackwardBytes<kDim>);
  plan("cached_tiles_kernel<" + dim + ",0>", CachedTiles<kDim, false>::kSharedBytes);
  plan("cached_tiles_kernel<" + dim + ",1>", CachedTiles<kDim, true>::kSharedBytes);
}

template <int kDim>
void plans_of_hopper() {
  plan(of("sm90::forward_kernel", kDim), sm90::ForwardTiles<kDim>::kSharedBytes);
  plan(of("sm90::backward_dq_kernel", kDim), sm90::BackwardDqTiles<kDim>::kSharedBytes);
  plan(of("sm90::backward_dkv_kernel", kDim), sm90::BackwardDkvTiles<kDim>::kSharedBytes);
}

template <int kRows>
void plans_of_streamed_weights() {
  plan(of("sm90::linear_states_kernel", kRows), sm90::LinearStatsTiles<kRows>::kSharedBytes);
  const std::string rows = std::to_string(kRows);
  plan("sm90::linear_kernel<" + rows + ",0>", sm90::StreamedLinearTiles<kRows, false>::kSharedBytes);
  plan("sm90::linear_kernel<" + rows + ",1>", sm90::StreamedLinearTiles<kRows, true>::kSharedBytes);
}

template <int kRows>
void plans_of_linear() {
  const std::string rows = std::to_string(kRows);
  plan("sm80::linear_kernel<" + rows + ",0,0>", sm80::LinearTiles<kRows, false>::kSharedBytes);
  plan("sm80::linear_kernel<" + rows + ",1,0>", sm80::LinearTiles<kRows, true>::kSharedBytes);
  plan("sm80::linear_kernel<" + rows + ",1,1>", sm80::LinearTiles<kRows, true>::kSharedBytes);
}

void print_plans(int64_t limit) {
  plans_of_ampere<64>();
  plans_of_ampere<128>();
  plans_of_ampere<256>();
  plans_of_hopper<64>();
  plans_of_hopper<128>();
  plans_of_streamed_weights<8>();
  plans_of_streamed_weights<16>();
  plans_of_streamed_weights<32>();
  plans_of_streamed_weights<64>();
  plans_of_linear<32>();
  plans_of_linear<64>();
  plan("commit_kernel", commit_shared_bytes(kMaxCandidates, true));
  plan("cross_entropy_in_place_kernel", resident_bytes(INT64_MAX / 2, limit));
}

}  // namespace
}  // namespace dllm::cuda

int main(int, char** arguments) { dllm::cuda::print_plans(std::atoll(arguments[1])); }
