#include "guarded_memory.h"

#include <c10/core/CPUAllocator.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cta.h"
#include "report.h"

namespace simt {
namespace {

constexpr size_t kPage = 4096, kAlignment = 16;

// ---- allocation: [guard page][slack][tensor][guard page], or [guard page][tensor][slack][guard page]
struct Guarded {
  char *mapping, *data;
  size_t mapped, bytes;
};
std::map<char*, Guarded>&
all_guarded() {  // by the end of the mapping; never destroyed, tensors may outlive it
  static auto* all = new std::map<char*, Guarded>;
  return *all;
}
std::map<char*, char*>& ends_of_mappings() {  // by the data
  static auto* all = new std::map<char*, char*>;
  return *all;
}
std::mutex lock;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t pages = (aligned + kPage - 1) / kPage * kPage;
    const size_t mapped = pages + 2 * kPage;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(mapping);
    mprotect(begin, kPage, PROT_NONE);
    mprotect(begin + kPage + pages, kPage, PROT_NONE);
    memset(begin + kPage, 0xFF, pages);
    // Most orders guard the end closely; the backward one guards the beginning.
    char* data = cta.order.seed == 1 ? begin + kPage : begin + kPage + pages - aligned;
    const std::lock_guard guard(lock);
    all_guarded()[begin + mapped] = {begin, data, mapped, bytes};
    ends_of_mappings()[data] = begin + mapped;
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* data) {
    if (!data) return;
    const std::lock_guard guard(lock);
    const auto end = ends_of_mappings().find(static_cast<char*>(data));
    const auto found = all_guarded().find(end->second);
    munmap(found->second.mapping, found->second.mapped);
    all_guarded().erase(found);
    ends_of_mappings().erase(end);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }  // of torch's 16-bit products
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

// ---- faults
struct sigaction previous_segv, previous_bus;
alignas(64) char fault_stack[256 * 1024];

std::string fault_text(char* address) {
  if (is_stack_overflow(address)) return "stack overflow: local memory of a thread is limited to 252 KB here";
  const auto next = all_guarded().upper_bound(address);
  if (next == all_guarded().end() || address < next->second.mapping)
    return "access of memory that is no tensor";
  const Guarded& tensor = next->second;
  const bool before = address < tensor.data;
  const auto distance = before ? tensor.data - address : address - (tensor.data + tensor.bytes) + 1;
  return "access of global memory " + std::to_string(distance) + " bytes " + (before ? "before" : "after") +
         " a tensor of " + std::to_string(tensor.bytes) + " bytes";
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!cta.kernel) {  // not ours: the fault comes again, to whom it belongs
    sigaction(signal, signal == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
    return;
  }
  const auto* registers = static_cast<ucontext_t*>(context);
#if defined(__x86_64__)
  const auto instruction = registers->uc_mcontext.gregs[REG_RIP];
#else
  const auto instruction = registers->uc_mcontext.pc;
#endif
  const auto* code = reinterpret_cast<const char*>(instruction);
  fail_at(fault_text(static_cast<char*>(info->si_addr)), Where(static_cast<const void*>(code + 1)));
}

}  // namespace

void guard_tensors(bool on) {
  static Allocator allocator;
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &allocator : usual, /*priority=*/255);
}

FaultsReported::FaultsReported() {
  stack_t stack{};
  stack.ss_sp = fault_stack, stack.ss_size = sizeof fault_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler leaves by a switch
  sigaction(SIGSEGV, &action, &previous_segv);
  sigaction(SIGBUS, &action, &previous_bus);
}

FaultsReported::~FaultsReported() {
  sigaction(SIGSEGV, &previous_segv, nullptr);
  sigaction(SIGBUS, &previous_bus, nullptr);
  stack_t none{};
  none.ss_flags = SS_DISABLE;
  sigaltstack(&none, nullptr);
}

}  // namespace simt
