// csrc/core/e4m3.h for test_e4m3.py, which calls it through ctypes.
#include "core/e4m3.h"

extern "C" {
void nearest(const float* from, int count, unsigned char* to) {
  for (int i = 0; i < count; i++) to[i] = dllm::E4m3::nearest(from[i]).bits;
}
void value(const unsigned char* from, int count, float* to) {
  for (int i = 0; i < count; i++) to[i] = dllm::E4m3{from[i]}.value();
}
}
