// Tensors between pages that nobody may touch: a kernel that leaves its tensor faults, and the fault is a
// diagnosis.
#pragma once

namespace simt {

// From now on CPU tensors are allocated so; undone by false. New memory is filled with 0xFF.
void guard_tensors(bool on);

// While this exists, faults of CUDA threads end their launch.
class FaultsReported {
 public:
  FaultsReported();
  ~FaultsReported();
};

}  // namespace simt
