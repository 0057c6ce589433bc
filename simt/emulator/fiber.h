// Stacks and the switch between them: a CUDA thread is a fiber that gives way where it waits.
#pragma once

#include <cstddef>

namespace simt {

// Of a fiber that does not run: where its registers lie on its stack.
using Context = void*;

// Goes on at `to`; returns when something switches back to `from`.
extern "C" void simt_switch(Context* from, Context to);

// A fiber that will call `entry`, which never returns, on stack `index` (0 to kMaxFibers − 1).
constexpr int kMaxFibers = 1024;
Context new_fiber(int index, void (*entry)());

// Is `address` in the guard page below one of the stacks?
bool is_stack_overflow(const void* address);

}  // namespace simt
