#include "static_variables.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace simt {
namespace {

struct Variable {
  std::string name;
  size_t offset, bytes;
};

// The file of this library, as the symbol table of its sections is not loaded.
struct LibraryFile {
  const char* base;
  const unsigned char* bytes;
  size_t size;

  LibraryFile() {
    Dl_info library;
    dladdr(reinterpret_cast<const void*>(&static_bytes_of), &library);
    base = static_cast<const char*>(library.dli_fbase);
    const int file = open(library.dli_fname, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0)
      throw std::runtime_error(std::string("the emulator cannot read ") + library.dli_fname);
    size = status.st_size;
    bytes = static_cast<const unsigned char*>(mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0));
    close(file);
  }
  ~LibraryFile() { munmap(const_cast<unsigned char*>(bytes), size); }

  template <class T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(bytes + offset);
  }
};

struct Symbols {
  std::vector<Variable> variables;
  std::multimap<const void*, std::string> functions;

  Symbols() {
    const LibraryFile file;
    const auto* header = file.at<ElfW(Ehdr)>(0);
    const auto* sections = file.at<ElfW(Shdr)>(header->e_shoff);
    for (int s = 0; s < header->e_shnum; s++) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      const char* names = file.at<char>(sections[sections[s].sh_link].sh_offset);
      const auto* symbols = file.at<ElfW(Sym)>(sections[s].sh_offset);
      for (size_t i = 0; i < sections[s].sh_size / sizeof *symbols; i++) add(file, names, symbols[i]);
    }
    if (variables.empty()) throw std::runtime_error("the emulator was stripped of its symbols");
  }

  void add(const LibraryFile& file, const char* names, const ElfW(Sym) & symbol) {
    const std::string name = names + symbol.st_name;
    const int type = symbol.st_info & 15;
    if (type == STT_FUNC && symbol.st_value) functions.emplace(file.base + symbol.st_value, name);
    if (type == STT_TLS && name.starts_with("_ZZ"))
      variables.push_back({name, symbol.st_value, symbol.st_size});
  }
};

const Symbols& symbols() {
  static const Symbols all;
  return all;
}

std::map<const void*, std::set<const Variable*>>& variables_of_kernels() {
  static std::map<const void*, std::set<const Variable*>> variables;
  return variables;
}

// Those that are named after the kernel are found when it is first asked about.
std::set<const Variable*>& variables_of(const void* kernel) {
  const auto [known, is_new] = variables_of_kernels().try_emplace(kernel);
  if (!is_new) return known->second;
  const auto [begin, end] = symbols().functions.equal_range(kernel);
  for (auto function = begin; function != end; ++function) {
    const std::string prefix = "_ZZ" + function->second.substr(2) + "E";
    for (const Variable& variable : symbols().variables)
      if (variable.name.starts_with(prefix)) known->second.insert(&variable);
  }
  return known->second;
}

std::vector<unsigned char> used;  // of each byte of the storage

}  // namespace

size_t static_bytes_of(const void* kernel) {
  size_t bytes = 0;
  for (const Variable* variable : variables_of(kernel)) bytes += variable->bytes;
  return bytes;
}

void begin_use_of_statics(size_t storage_bytes) { used.assign(storage_bytes, 0); }
void note_use_of_static(size_t offset) { used[offset] = 1; }

void end_use_of_statics(const void* kernel) {
  std::set<const Variable*>& known = variables_of(kernel);
  for (const Variable& variable : symbols().variables)
    for (size_t i = 0; i < variable.bytes && !known.contains(&variable); i++)
      if (used[variable.offset + i]) known.insert(&variable);
}

}  // namespace simt
