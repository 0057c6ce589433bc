// Shared memory of the running CTA, and what is known about each of its bytes: who wrote and read it last,
// and whether an asynchronous copy into it is under way.
#pragma once

#include <cstddef>
#include <string>

#include "report.h"

namespace simt {

constexpr size_t kMaxSharedBytes = 227 * 1024;  // of any device

void reserve_shared_memory(size_t dynamic_bytes, int threads);
void poison_shared_memory();  // a CTA begins
// Once all threads have exited: whose copies were not waited for, else nothing.
std::string unfinished_copies_of_threads();

enum class Access { read, write, atomic };
void check_access(Access access, const void* address, size_t bytes, const Where& where);
// A matrix product reads: what ordinary stores wrote needs a fence.
void check_asynchronous_read(const void* address, size_t bytes, const Where& where);

// From the one to the other nobody may touch these bytes, which a copy overwrites; it is the engine that
// writes.
void start_copy(void* address, size_t bytes);
void land_copy(void* address, size_t bytes);

}  // namespace simt
