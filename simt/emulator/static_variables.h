// How much static shared memory a kernel has, which counts towards the limits of its launches. The compiler
// tells nobody: the variables are those that the library's symbols name after the kernel, and those of other
// functions that its CTAs were seen to use.
#pragma once

#include <cstddef>

namespace simt {

size_t static_bytes_of(const void* kernel);

// What a kernel uses, at byte offsets of this library's thread-local storage.
void begin_use_of_statics(size_t storage_bytes);
void note_use_of_static(size_t offset);
void end_use_of_statics(const void* kernel);

}  // namespace simt
