// Wording of diagnoses.
#pragma once

#include <string>
#include <vector>

#include "simt/device.h"

namespace simt {

std::string file_text(const std::string& path);  // from the source tree's root on
// "csrc/cuda/commit/kernel.cuh:12"
std::string site_text(Site site);
bool same_site(Site a, Site b);
// Function and line that an instruction of this library was compiled from.
std::string code_text(const void* instruction);

std::string kernel_text();                                  // "kernel f<float>, block (0, 1, 0)"
std::string position_text();                                // and ", thread (3, 0, 0): "
std::string threads_text(const std::vector<int>& threads);  // "threads 0-31, 40"

// Where something was asked for: put into words only when it is reported.
class Where {
 public:
  Where(Site site) : site_(site) {}
  explicit Where(const void* instruction) : instruction_(instruction) {}
  std::string text() const { return instruction_ ? code_text(instruction_) : site_text(site_); }

 private:
  const void* instruction_ = nullptr;
  Site site_;
};

// Ends the launch.
[[noreturn]] void fail_at(const std::string& text, const std::string& where);
[[noreturn]] inline void fail_at(const std::string& text, const Where& where) { fail_at(text, where.text()); }

}  // namespace simt
