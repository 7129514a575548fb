// SPDX-License-Identifier: Apache-2.0
// The pybind11 module: functions that are no tensor ops. Loading it also registers the ops of csrc/ops/cpu.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <array>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/macros.h"
#include "core/philox.h"
#include "cpu/bipartite.h"
#include "cpu/graph.h"
#include "cpu/graph_layout.h"
#include "ops/cuda/library.h"
#include "ops/faults.h"

namespace py = pybind11;

namespace {

// An exception that a signal handler, or a warning turned into an error, raised while an op ran. The dispatcher would replace it by a
// RuntimeError of its own, so it waits here for gibbs_ext/ops.py.
PyObject* pending_exception = nullptr;
PyObject* warn_function = nullptr;

void keep_exception() {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  Py_XDECREF(pending_exception);
  pending_exception = value;
  Py_XDECREF(type);
  Py_XDECREF(traceback);
}

bool interrupted() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  keep_exception();
  return true;
}

bool warn(const char* message) {
  const py::gil_scoped_acquire gil;
  PyObject* done = warn_function ? PyObject_CallFunction(warn_function, "s", message) : nullptr;
  Py_XDECREF(done);
  if (done || !PyErr_Occurred()) return true;
  keep_exception();
  return false;
}

py::dict build_info() {
  py::dict info;
  info["version"] = GIBBS_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if GIBBS_X86
  info["cpu_instruction_sets"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["cpu_instruction_sets"] = py::make_tuple("baseline");
#endif
  info["instruction_set"] = gibbs::kernels().name;
  info["stable_abi"] = ">= 2.10";
  return info;
}

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

// kKernel: &Kernels::thresholds or &Kernels::acceptances.
template <auto kKernel>
py::array_t<uint32_t> by_kernel(const FloatArray& logit) {
  const int64_t n = logit.size(), padded = gibbs::round_up(n, 32);
  std::vector<float> in(size_t(padded), 0.0f);
  std::vector<uint32_t> out(static_cast<size_t>(padded));
  std::copy(logit.data(), logit.data() + n, in.begin());
  (gibbs::kernels().*kKernel)(in.data(), padded, out.data());
  py::array_t<uint32_t> result(std::vector<py::ssize_t>(logit.shape(), logit.shape() + logit.ndim()));
  std::copy(out.begin(), out.begin() + n, result.mutable_data());
  return result;
}

py::tuple round_couplings(const py::array& weight) {
  if (weight.ndim() != 2) throw py::value_error("round_couplings: weight must have shape [n1, n2]");
  const bool is_double = py::isinstance<py::array_t<double>>(weight);
  if (!is_double && !py::isinstance<py::array_t<float>>(weight))
    throw py::value_error("round_couplings: weight must be a float32 or float64 array");
  const int64_t n1 = weight.shape(0), n2 = weight.shape(1), size = is_double ? 8 : 4;
  if (n1 < 1 || n2 < 1) throw py::value_error("round_couplings: weight must have at least one unit on each side");
  const gibbs::CouplingView view = {weight.data(), is_double, n1, n2, weight.strides(0) / size, weight.strides(1) / size};
  const int64_t ld1 = gibbs::padded_row(n1), ld2 = gibbs::padded_row(n2);
  std::vector<double> sums(size_t(2 * ld2));
  std::vector<int32_t> rows(size_t(ld1 * ld2)), columns(size_t(ld2 * ld1));
  gibbs::WeightScale scale;
  if (gibbs::kernels().scale_couplings(view, sums.data(), scale) != gibbs::CouplingStatus::kOk)
    throw py::value_error("round_couplings: weight must be finite and less than 2^127 in magnitude");
  gibbs::kernels().round_couplings(view, scale.k, 0, n1, {rows.data(), columns.data(), 0.0f});
  py::array_t<int32_t> out({n1, n2});
  auto to = out.mutable_unchecked<2>();
  for (int64_t i = 0; i < n1; ++i)
    for (int64_t j = 0; j < n2; ++j) {
      to(i, j) = rows[size_t(i * ld2 + j)];
      if (columns[size_t(j * ld1 + i)] != to(i, j)) throw std::logic_error("round_couplings: the transpose differs");
    }
  return py::make_tuple(out, scale.k);
}

using LongArray = py::array_t<int64_t, py::array::c_style>;

py::array_t<int32_t> graph_layout(int64_t num_nodes, const LongArray& edges, const std::optional<LongArray>& colors) {
  if (edges.ndim() != 2 || edges.shape(1) != 2) throw py::value_error("graph_layout: edges must have shape [E, 2]");
  const std::span<const int64_t> ends(edges.data(), size_t(edges.size()));
  std::optional<std::span<const int64_t>> given;
  if (colors) given.emplace(colors->data(), size_t(colors->size()));
  std::vector<int32_t> layout;
  {
    const py::gil_scoped_release nogil;
    layout = gibbs::graph_layout(num_nodes, ends, given);
  }
  return py::array_t<int32_t>(py::ssize_t(layout.size()), layout.data());
}

std::vector<std::string> routes(const gibbs::CudaLibrary& library) {
  std::vector<std::string> names;
  for (int i = 0; const char* name = library.route_name(i); ++i) names.emplace_back(name);
  return names;
}

[[noreturn]] void refuse_route(const char* function, const std::vector<std::string>& names, const std::string& got) {
  std::string list = names[0];
  for (size_t i = 1; i < names.size(); ++i) list += (i + 1 < names.size() ? ", " : " or ") + names[i];
  throw py::value_error(std::string(function) + ": name must be " + list + ", got " + got);
}

// Loads the library that holds the CUDA kernels, which registers them. It stays loaded.
const gibbs::CudaLibrary* load_cuda(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw py::import_error(dlerror());
  using Entry = const gibbs::CudaLibrary* (*)();
  const Entry entry = reinterpret_cast<Entry>(dlsym(library, "gibbs_cuda_library"));
  if (!entry) throw py::import_error(dlerror());
  entry()->set_hooks(gibbs::hooks);
  return entry();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  gibbs::hooks.interrupted = interrupted;
  gibbs::hooks.warn = warn;
  m.def("build_info", build_info);
  m.def("philox", [](const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
    const gibbs::PhiloxOutput out = gibbs::philox4x32(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
    return py::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
  });
  // The kernels in force draw these words, a vector at a time.
  m.def("random_words", [](int64_t seed, uint64_t chain, uint64_t sweep, int64_t units) {
    std::vector<uint32_t> words(size_t(gibbs::random_bytes_capacity(units)));
    std::vector<uint8_t> bytes(words.size());
    gibbs::kernels().random_words(uint64_t(seed), chain, sweep, units, words.data(), bytes.data());
    return py::array_t<uint32_t>(units, words.data());
  });
  m.def("random_word", [](int64_t seed, uint64_t chain, uint64_t sweep, uint32_t unit) {
    return gibbs::random_word(gibbs::random_stream(uint64_t(seed), chain, sweep), unit);
  });
  m.def("threshold", by_kernel<&gibbs::Kernels::thresholds>);
  m.def("acceptance", by_kernel<&gibbs::Kernels::acceptances>);
  m.def("round_couplings", round_couplings);
  m.def("graph_layout", graph_layout);
  m.def("set_instruction_set", [](const std::string& name) {
    if (!gibbs::set_instruction_set(name.c_str()))
      throw py::value_error("set_instruction_set: name must be auto, baseline, avx2 or avx512, and this CPU must have it; got " +
                            name);
  });
  // Chooses how binary sweeps on graphs are made, for tests and benchmarks.
  m.def("set_graph_route", [](const std::string& name) {
    if (!gibbs::set_graph_route(name.c_str()))
      refuse_route("set_graph_route", {std::begin(gibbs::kGraphRouteNames), std::end(gibbs::kGraphRouteNames)}, name);
  });
  m.def("instruction_set", [] { return gibbs::kernels().name; });
  py::class_<gibbs::CudaLibrary, std::unique_ptr<gibbs::CudaLibrary, py::nodelete>>(m, "CudaLibrary")
      .def_property_readonly("architectures", [](const gibbs::CudaLibrary& library) { return library.architectures; })
      .def("take_fault",
           [](const gibbs::CudaLibrary& library, int device) -> std::optional<std::string> {
             const char* fault = library.take_fault(device);
             return fault ? std::optional<std::string>(fault) : std::nullopt;
           })
      .def_property_readonly("routes", routes)
      .def("set_route",
           [](const gibbs::CudaLibrary& library, const std::string& name) {
             if (!library.set_route(name.c_str())) refuse_route("set_route", routes(library), name);
           })
      .def_property_readonly("last_route", [](const gibbs::CudaLibrary& library) { return library.last_route(); });
  m.def("load_cuda", load_cuda, py::return_value_policy::reference);
  m.def("take_exception", []() -> py::object {
    if (!pending_exception) return py::none();
    return py::reinterpret_steal<py::object>(std::exchange(pending_exception, nullptr));
  });
  m.def("set_warn", [](const py::object& function) {
    Py_XDECREF(warn_function);
    warn_function = py::object(function).release().ptr();
  });
}
