// The extension module: list the instances, load them, launch them.  Knows nothing of torch.
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>
#include <unordered_map>

#include "marshal.h"
#include "registry.h"
#include "runtime.h"

namespace py = pybind11;

namespace hopper_attention {
namespace {

const Instance& find(py::handle name) {
  static const auto by_name = [] {
    std::unordered_map<std::string_view, const Instance*> map;
    for (std::size_t i = 0; i < instance_count; ++i) map[instances[i].name] = &instances[i];
    return map;
  }();
  Py_ssize_t length = 0;
  const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &length);
  if (text == nullptr) throw py::error_already_set();
  const auto found = by_name.find(std::string_view(text, static_cast<std::size_t>(length)));
  if (found == by_name.end())
    throw py::key_error("no instance " + std::string(py::repr(name)) + " in this build");
  return *found->second;
}

py::list instance_names() {
  py::list names;
  for (std::size_t i = 0; i < instance_count; ++i) names.append(instances[i].name);
  return names;
}

void load_by_name(py::str name, int device) {
  const Instance& instance = find(name);
  try {
    load(instance, device);
  } catch (const RuntimeFailure& failure) {
    throw std::runtime_error(std::string(instance.name) + ": " + failure.what());
  }
}

void launch_by_name(py::str name, int device, std::uintptr_t stream, py::handle tensors,
                    py::handle scalars) {
  const Instance& instance = find(name);
  PackedArguments arguments(instance, tensors, scalars, stream);
  try {
    launch(instance, device, arguments);
  } catch (const RuntimeFailure& failure) {
    throw std::runtime_error(std::string(instance.name) + " on device " + std::to_string(device) +
                             ": " + failure.what() + " (" + describe_tensors(instance, tensors) +
                             ")");
  }
}

}  // namespace

PYBIND11_MODULE(HOPPER_ATTENTION_MODULE, module) {
  module.doc() = "Compiled attention kernels, launched by address, shape and stride.";
  module.def("instances", &instance_names, "Names of the compiled instances.");
  module.def("load", &load_by_name, py::arg("name"), py::arg("device"),
             "Load an instance onto a device now, so that a launch under graph capture need not.");
  module.def("launch", &launch_by_name, py::arg("name"), py::arg("device"), py::arg("stream"),
             py::arg("tensors"), py::arg("scalars"),
             "Launch an instance.\n\n"
             "tensors: list of (address, shape, strides), strides in elements; scalars: list of\n"
             "numbers; each in the order of the instance's arguments (manifest.json).  Raises\n"
             "KeyError, TypeError or ValueError before anything is launched, RuntimeError where the\n"
             "runtime fails.");
  add_functions(module);
}

}  // namespace hopper_attention
