// The products of CUTLASS behind skinny_linear. Operands are swapped: outputs are rows of its tiles and rows
// of x are columns, so that few rows of x fill a tile, and a weight narrower than x is the operand that
// CUTLASS widens in registers.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <stdexcept>
#include <string>

#include "core/params.h"
#include "cuda/skinny_linear/config.h"
#include "cuda/skinny_linear/cutlass/launch.h"
#include "cuda/sm90/weight_stream.h"

namespace dllm::cuda::cutlass_gemm {

using namespace cute;

// scale · sum + bias for each output, where x is quantized times the scale of its row too.
template <class Tile, class Out, bool kScaledX>
struct ScaledSums {
  template <class Op, class... Operands>
  using Tree = cutlass::epilogue::fusion::Sm90EVT<Op, Operands...>;
  template <template <class> class Op, class Result>
  using Compute =
      cutlass::epilogue::fusion::Sm90Compute<Op, Result, float, cutlass::FloatRoundStyle::round_to_nearest>;
  template <class Element>
  using OfOutput = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, Element, float>;
  using OfRow = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float>;
  using Sums = cutlass::epilogue::fusion::Sm90AccFetch;

  using OfX = Tree<Compute<cutlass::multiplies, float>, OfRow, Sums>;
  using Type = Tree<Compute<cutlass::homogeneous_multiply_add, Out>, OfOutput<float>,
                    conditional_t<kScaledX, OfX, Sums>, OfOutput<Out>>;

  static typename Type::Arguments arguments(const SkinnyLinearParams& p) {
    const typename OfOutput<float>::Arguments scales{p.scales};
    const typename OfOutput<Out>::Arguments bias{static_cast<const Out*>(p.bias)};
    if constexpr (kScaledX) return {scales, {{p.x_scales}, {}, {}}, bias, {}};
    else return {scales, {}, bias, {}};
  }
};

// A tile is kOutputs of a step of kInputs times kRows of x; kCluster tiles of outputs share their copy of x.
// kSplit: the inputs may be cut in splits, whose sums are added in their order.
template <class Weight, class X, class Out, int kRows, int kInputs, int kCluster, bool kSplit>
struct LinearGemm {
  static constexpr int kOutputs = LinearSplits::kOutputs, kOutAlignment = 16 / sizeof(Out);
  using Tile = Shape<Int<kOutputs>, Int<kRows>, Int<kInputs>>;
  using Cluster = Shape<Int<kCluster>, _1, _1>;
  using Epilogue = ScaledSums<Tile, Out, sizeof(X) == 1>;

  using Results = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::ColumnMajor,
      kOutAlignment, Out, cutlass::layout::ColumnMajor, kOutAlignment,
      cutlass::epilogue::TmaWarpSpecializedCooperative, typename Epilogue::Type>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(typename Results::SharedStorage))>;
  using Products = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Weight, cutlass::layout::RowMajor,
      16 / sizeof(Weight), X, cutlass::layout::ColumnMajor, 16 / sizeof(X), float, Tile, Cluster, Stages,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Scheduler =
      conditional_t<kSplit, cutlass::gemm::StreamKScheduler, cutlass::gemm::PersistentScheduler>;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Products, Results, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= sm90::kMaxSharedBytes);

  static typename Gemm::Arguments arguments(const SkinnyLinearParams& p, int multiprocessors) {
    typename Gemm::Arguments all{};
    all.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    all.problem_shape = make_shape(p.outputs, static_cast<int>(p.rows), p.inputs, 1);
    all.mainloop.ptr_A = static_cast<const Weight*>(p.weight);
    all.mainloop.dA = {p.weight_stride, {}, {}};
    all.mainloop.ptr_B = static_cast<const X*>(p.x);
    all.mainloop.dB = {p.inputs, {}, {}};
    all.epilogue.thread = Epilogue::arguments(p);
    all.epilogue.ptr_D = static_cast<Out*>(p.out);
    all.epilogue.dD = {{}, p.outputs, {}};
    all.hw_info.sm_count = multiprocessors;
    if constexpr (kSplit) {
      using Mode = decltype(all.scheduler.decomposition_mode);
      static_assert(kInputs == LinearSplits::kStepBytes / sizeof(Weight));
      all.scheduler.splits = linear_splits(p.outputs, p.inputs, sizeof(Weight)).splits;
      all.scheduler.decomposition_mode = all.scheduler.splits > 1 ? Mode::SplitK : Mode::DataParallel;
    }
    return all;
  }
};

// visit(LinearGemm()) with the one for a problem. CUTLASS adds sums of 128 products of e4m3 in float32: the
// tensor cores of Hopper keep fewer bits of those.
template <class T, bool kE4m3, class Visit>
auto with_gemm(const SkinnyLinearParams& p, const Visit& visit) {
  using Out = conditional_t<is_same_v<T, __half>, cutlass::half_t, cutlass::bfloat16_t>;
  if constexpr (kE4m3) {
    using E4m3 = cutlass::float_e4m3_t;
    return p.rows <= sm90::kMaxStreamRows
               ? visit(LinearGemm<E4m3, E4m3, Out, sm90::kMaxStreamRows, 128, 1, true>())
               : visit(LinearGemm<E4m3, E4m3, Out, 128, 128, 2, false>());
  } else {
    return visit(LinearGemm<int8_t, Out, Out, 128, 64, 2, false>());
  }
}

// Of the current device, which is bound to the calling thread: CUTLASS encodes tensor maps in its context,
// and a thread that has launched nothing has none yet.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

template <class T, bool kE4m3>
size_t workspace_of(const SkinnyLinearParams& p) {
  int count = 0;
  if (multiprocessors(count) != cudaSuccess) return 0;  // the launch says why
  return with_gemm<T, kE4m3>(p, [&](auto gemm) {
    using Linear = decltype(gemm);
    return Linear::Gemm::get_workspace_size(Linear::arguments(p, count));
  });
}

// Throws where CUTLASS does not do a step for a problem: no cudaError_t says which, nor why.
inline void check_status(cutlass::Status status, const char* step, const SkinnyLinearParams& p) {
  if (status == cutlass::Status::kSuccess) return;
  const char* of_cuda = cudaGetErrorString(cudaGetLastError());  // which nothing after this reports again
  throw std::runtime_error("skinny_linear: CUTLASS failed to " + std::string(step) + " " +
                           std::to_string(p.rows) + " rows of x, " + std::to_string(p.inputs) + " inputs, " +
                           std::to_string(p.outputs) + " outputs, " + (p.e4m3 ? "e4m3" : "int8") +
                           " weight: " + cutlass::cutlassGetStatusString(status) + " (CUDA: " + of_cuda +
                           ")");
}

template <class T, bool kE4m3>
cudaError_t launch_gemm(const SkinnyLinearParams& p, void* workspace, cudaStream_t stream) {
  int count = 0;
  if (const cudaError_t status = multiprocessors(count); status != cudaSuccess) return status;
  return with_gemm<T, kE4m3>(p, [&](auto gemm) {
    using Linear = decltype(gemm);
    const auto arguments = Linear::arguments(p, count);
    check_status(Linear::Gemm::can_implement(arguments), "take", p);
    typename Linear::Gemm product;
    check_status(product.run(arguments, workspace, stream), "multiply", p);
    return cudaSuccess;
  });
}

}  // namespace dllm::cuda::cutlass_gemm
