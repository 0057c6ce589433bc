#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 * 1024;  // of which the lowest page is never to be touched

// Address space only, until a stack is used.
char* stacks() {
  static char* const memory = [] {
    void* region = mmap(nullptr, kStack * kMaxFibers, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) throw std::runtime_error("no address space for the stacks of CUDA threads");
    for (int i = 0; i < kMaxFibers; i++) mprotect(static_cast<char*>(region) + i * kStack, kPage, PROT_NONE);
    return static_cast<char*>(region);
  }();
  return memory;
}

}  // namespace

bool is_stack_overflow(const void* address) {
  const size_t offset = static_cast<const char*>(address) - stacks();
  return offset < kStack * kMaxFibers && offset % kStack < kPage;
}

#if defined(__x86_64__)
// Saved: what a function must preserve. The entry finds the stack as after a call.
asm(R"(
  .text
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 6, kEntryWord = 6;
#elif defined(__aarch64__)
asm(R"(
  .text
  .globl simt_switch
  .hidden simt_switch
  .type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size simt_switch, .-simt_switch
)");
constexpr int kSavedWords = 20, kEntryWord = 11;
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif

Context new_fiber(int index, void (*entry)()) {
  // Tops differ in their low bits, or all threads would compete for the same lines of the cache.
  char* top = stacks() + (index + 1) * kStack - 256 - index % 32 * 448;
  top -= reinterpret_cast<uintptr_t>(top) % 16;
  // On x86-64 the entry's stack pointer is 8 short of a multiple of 16, as a call leaves it.
  void** saved = reinterpret_cast<void**>(top) - kSavedWords - 2;
  for (int i = 0; i < kSavedWords + 2; i++) saved[i] = nullptr;
  saved[kEntryWord] = reinterpret_cast<void*>(entry);
  return saved;
}

}  // namespace simt
