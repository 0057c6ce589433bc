// Python module dllm_kernels.lib._host: host-side data structures.
#include <algorithm>
#include <cstdint>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/block_pool.h"

namespace py = pybind11;
using dllm::host::BlockPool;
using dllm::host::PageId;
using dllm::host::PagesExhausted;
using dllm::host::SequenceId;

namespace {

py::array_t<PageId> page_table(const BlockPool& pool, const std::vector<SequenceId>& sequences) {
  std::size_t width = 0;
  for (const SequenceId sequence : sequences) width = std::max(width, pool.pages_of(sequence).size());
  py::array_t<PageId> table({sequences.size(), width});
  PageId* row = table.mutable_data();
  for (const SequenceId sequence : sequences) {
    const std::vector<PageId>& pages = pool.pages_of(sequence);
    std::fill(std::copy(pages.begin(), pages.end(), row), row + width, 0);
    row += width;
  }
  return table;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side data structures of dllm_kernels.";
  py::register_exception<PagesExhausted>(m, "PagesExhausted", PyExc_RuntimeError);

  py::class_<BlockPool>(m, "BlockPool",
                        R"(Pages of a paged K/V cache, counted references, sequences over them.

Every call succeeds, or raises and changes nothing: PagesExhausted, or ValueError for a bad argument.)")
      .def(py::init<std::int64_t>(), py::arg("pages"))
      .def("allocate", &BlockPool::allocate, py::arg("pages"), "Id of a new sequence with `pages` pages.")
      .def("append", &BlockPool::append, py::arg("sequence"), py::arg("pages"),
           "Give `sequence` more pages at its end.")
      .def("fork", &BlockPool::fork, py::arg("sequence"), py::arg("shared"), py::arg("pages"),
           "Id of a new sequence: the first `shared` pages of `sequence`, then `pages` of its own.")
      .def("free", &BlockPool::free, py::arg("sequence"), "End `sequence`; pages nobody holds become free.")
      .def("reset", &BlockPool::reset, "End every sequence.")
      .def("pages_of", &BlockPool::pages_of, py::arg("sequence"), "Page ids of `sequence`, in order.")
      .def("shared_pages", &BlockPool::shared_pages, py::arg("sequence"),
           "How many pages at the start of `sequence` another sequence holds too.")
      .def("reference_count", &BlockPool::reference_count, py::arg("page"), "How many sequences hold `page`.")
      .def("page_table", &page_table, py::arg("sequences"),
           "int32 [sequences, most pages of any], filled with 0 behind each row's own pages.")
      .def_property_readonly("pages", &BlockPool::pages)
      .def_property_readonly("pages_free", &BlockPool::pages_free)
      .def_property_readonly("sequences", &BlockPool::sequences);
}
