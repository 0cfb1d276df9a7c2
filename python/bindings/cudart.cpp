// Which libcudart: the one already in the process (torch's: it knows the current device), else the
// flavour's by its soname, else the one of the nvidia-cuda-runtime wheel.
#include "cudart.h"

#include <Python.h>
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <utility>
#include <vector>

#include "registry.h"

namespace hopper_attention {
namespace {

struct Search {
  Cudart library;
  bool found = false;
  std::string missing;
};

int collect_loaded(dl_phdr_info* info, std::size_t, void* paths) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* file = slash ? slash + 1 : info->dlpi_name;
  if (std::strncmp(file, "libcudart", 9) == 0)
    static_cast<std::vector<std::string>*>(paths)->push_back(info->dlpi_name);
  return 0;
}

std::vector<std::string> candidates() {
  std::vector<std::string> paths;
  dl_iterate_phdr(&collect_loaded, &paths);
  const std::string soname = "libcudart.so." + std::to_string(cuda_major);
  paths.push_back(soname);
  const std::string folder =
      cuda_major == 12 ? "cuda_runtime" : "cu" + std::to_string(cuda_major);
  PyObject* entries = PySys_GetObject("path");  // borrowed
  for (Py_ssize_t i = 0; entries && PyList_Check(entries) && i < PyList_GET_SIZE(entries); ++i) {
    const char* entry = PyUnicode_AsUTF8(PyList_GET_ITEM(entries, i));
    if (entry == nullptr) {
      PyErr_Clear();
      continue;
    }
    paths.push_back(std::string(entry) + "/nvidia/" + folder + "/lib/" + soname);
  }
  return paths;
}

// The name of a function that the library lacks, or null.
const char* resolve(void* handle, Cudart& library) {
#define F(name)                                                              \
  library.name = reinterpret_cast<decltype(&::name)>(dlsym(handle, #name)); \
  if (library.name == nullptr) return #name;
  HOPPER_ATTENTION_CUDART_FUNCTIONS(F)
#undef F
  return nullptr;
}

std::string path_of(const void* function, const std::string& fallback) {
  Dl_info info;
  return dladdr(function, &info) && info.dli_fname ? info.dli_fname : fallback;
}

Search search() {
  Search result;
  result.missing = "no libcudart.so." + std::to_string(cuda_major) +
                   " was found; install torch with CUDA, or nvidia-cuda-runtime";
  for (const std::string& path : candidates()) {
    void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (handle == nullptr) continue;
    if (const char* lacks = resolve(handle, result.library)) {
      result.missing = path + " has no " + lacks + ": a newer one is needed";
      dlclose(handle);
      continue;
    }
    result.library.path = path_of(reinterpret_cast<void*>(result.library.cudaGetDevice), path);
    result.found = true;
    break;
  }
  return result;
}

const Search& searched() {
  static const Search result = search();
  return result;
}

}  // namespace

const Cudart* cudart() { return searched().found ? &searched().library : nullptr; }

const std::string& cudart_missing() { return searched().missing; }

}  // namespace hopper_attention
