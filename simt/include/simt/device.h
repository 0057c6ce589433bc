// What the shadow headers ask of the emulator on behalf of the running CUDA thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "simt/vector_types.h"

namespace simt {

using Site = std::source_location;  // where in a kernel a barrier or collective stands

// ---- where the thread is. Constant for a thread, so the compiler may remember them.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] int lane_index();

// ---- barriers
// Barrier `id` for `threads` threads; all of the CTA: 0. With `wait` false the thread is counted and goes on.
// Returns how many of them had a true predicate.
int barrier(const char* what, int id, int threads, bool wait, bool predicate, Site site);

// ---- the launch before this one
// Until a thread of an overlapping launch has called it, its copies fail; some thread of each CTA has to.
void griddepcontrol_wait();

// ---- warp collectives
// Waits for the lanes of `mask`; the last to come calls work(exchanges, mask), where exchanges[lane] is what
// that lane passed here. `orders_memory`: what lanes wrote before is seen by the others after.
using Work = void (*)(void* const* exchanges, unsigned mask);
void rendezvous(const char* what, unsigned mask, void* exchange, Work work, bool orders_memory, Site site);

// ---- shared memory
void* dynamic_shared();
// Shared addresses are counted from one base, so that they fit 32 bits as on a GPU.
size_t shared_offset(const void* shared);
void* shared_pointer(size_t offset);
// An atomic read-modify-write of `bytes` at an address is about to happen.
void check_atomic(const void* address, size_t bytes, Site site);
// 16 bytes on their way to shared memory; `global` null: zeros.
void cp_async(void* shared, const void* global, Site site);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
// ldmatrix.x4 and mma.m16n8k16 for the whole warp.
void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, Site site);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16, Site site);

// Ends the launch with `text` as its diagnosis.
[[noreturn]] void fail(const char* text, Site site);

}  // namespace simt
