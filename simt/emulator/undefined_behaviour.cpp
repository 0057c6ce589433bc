// What code compiled with -fsanitize=alignment,bounds calls where it is about to do something undefined. The
// sanitizer's own runtime is not linked; its data lies as GCC and Clang lay it out.
#include <cstdint>
#include <string>

#include "cta.h"
#include "report.h"

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];  // in quotes, zero-terminated
};
struct Mismatch {
  Location location;
  const Type* type;
  unsigned char log_alignment, what;
};
struct OutOfBounds {
  Location location;
  const Type *array, *index;
};

void fail(const std::string& text, const Location& location) {
  if (simt::cta.kernel)
    simt::fail_at(text, simt::file_text(location.file) + ":" + std::to_string(location.line));
}

}  // namespace

extern "C" {
void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  fail("access of " + std::string(data->type->name) + " at an address that is " +
           std::to_string(address % alignment) + " bytes off a multiple of " + std::to_string(alignment),
       data->location);
}
void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  fail("index " + std::to_string(static_cast<intptr_t>(index)) + " of " + data->array->name +
           " is out of bounds",
       data->location);
}
}
