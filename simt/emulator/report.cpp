#include "report.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <sstream>

#include "cta.h"

namespace simt {
namespace {

// Lines of addr2line: function and position, inlined ones first.
std::vector<std::string> debug_lines(const void* instruction) {
  Dl_info library;
  std::vector<std::string> lines;
  if (!dladdr(instruction, &library)) return lines;
  std::ostringstream command;
  command << "addr2line -f -C -e '" << library.dli_fname << "' 0x" << std::hex
          << static_cast<const char*>(instruction) - static_cast<const char*>(library.dli_fbase)
          << " 2>/dev/null";
  if (FILE* pipe = popen(command.str().c_str(), "r")) {
    char line[4096];
    while (fgets(line, sizeof line, pipe)) lines.emplace_back(line, strcspn(line, "\n"));
    pclose(pipe);
  }
  return lines;
}

std::string coordinates(uint3 x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

}  // namespace

std::string file_text(const std::string& path) {
  for (const char* root : {"/csrc/", "/tests/"})
    if (const size_t at = path.rfind(root); at != std::string::npos) return path.substr(at + 1);
  return path;
}

std::string site_text(Site site) { return file_text(site.file_name()) + ":" + std::to_string(site.line()); }

bool same_site(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

std::string code_text(const void* instruction) {
  const auto lines = debug_lines(static_cast<const char*>(instruction) - 1);
  if (lines.size() < 2) return "";
  return file_text(lines[1].substr(0, lines[1].find(" (")));
}

std::string kernel_text() {
  const auto lines = debug_lines(cta.kernel);
  std::string name = lines.empty() ? "?" : lines[0].substr(0, lines[0].rfind('('));
  if (name.starts_with("void ")) name = name.substr(5);
  return "kernel " + name + ", block " + coordinates(cta.block);
}

std::string position_text() { return kernel_text() + ", thread " + coordinates(thread_index()) + ": "; }

std::string threads_text(const std::vector<int>& threads) {
  std::string text = "threads ";
  for (size_t i = 0, end; i < threads.size(); i = end) {
    for (end = i + 1; end < threads.size() && threads[end] == threads[end - 1] + 1;) end++;
    text += (i ? ", " : "") + std::to_string(threads[i]);
    if (end > i + 1) text += "-" + std::to_string(threads[end - 1]);
  }
  return text;
}

}  // namespace simt
