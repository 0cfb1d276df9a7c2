// The runtime on a GPU: forwards to libcudart.
#include <string>

#include "cudart.h"
#include "loader.h"
#include "runtime.h"

namespace py = pybind11;

namespace hopper_attention {
namespace {

const Cudart& require_cudart() {
  const Cudart* library = cudart();
  if (library == nullptr) throw RuntimeFailure("CUDA is not available: " + cudart_missing());
  return *library;
}

void require(cudaError_t error) {
  if (error != cudaSuccess) throw RuntimeFailure(describe(error));
}

// Makes a device current, and the one before it on leaving; does nothing where it is current already.
class DeviceGuard {
 public:
  DeviceGuard(const Cudart& cuda, int device) : cuda_(cuda) {
    require(cuda.cudaGetDevice(&before_));
    changed_ = before_ != device;
    if (changed_) require(cuda.cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cuda_.cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const Cudart& cuda_;
  int before_ = 0;
  bool changed_ = false;
};

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

py::dict runtime_info() {
  py::dict info;
  info["flavour"] = "cu" + std::to_string(cuda_major);
  info["available"] = false;
  const Cudart* cuda = cudart();
  if (cuda == nullptr) {
    info["reason"] = cudart_missing();
    return info;
  }
  info["libcudart"] = cuda->path;
  int version = 0;
  if (cuda->cudaRuntimeGetVersion(&version) == cudaSuccess)
    info["runtime_version"] = version_text(version);
  if (cuda->cudaDriverGetVersion(&version) == cudaSuccess && version > 0)
    info["driver_version"] = version_text(version);
  int devices = 0;
  const cudaError_t error = cuda->cudaGetDeviceCount(&devices);
  info["device_count"] = devices;
  info["available"] = error == cudaSuccess && devices > 0;
  if (error != cudaSuccess) info["reason"] = describe(error);
  return info;
}

}  // namespace

std::string describe(cudaError_t error) {
  const Cudart* cuda = cudart();
  if (cuda == nullptr) return cudart_missing();
  return std::string(cuda->cudaGetErrorName(error)) + ": " + cuda->cudaGetErrorString(error);
}

void load(const Instance& instance, int device) {
  const Cudart& cuda = require_cudart();
  py::gil_scoped_release release;
  DeviceGuard guard(cuda, device);
  require(ensure_loaded(instance, device));
}

void launch(const Instance& instance, int device, PackedArguments& arguments) {
  const Cudart& cuda = require_cudart();
  py::gil_scoped_release release;
  DeviceGuard guard(cuda, device);
  require(ensure_loaded(instance, device));
  require(static_cast<cudaError_t>(arguments.call(instance)));
}

void add_functions(py::module_& module) {
  module.def("runtime_info", &runtime_info,
             "flavour, available, libcudart, runtime_version, driver_version, device_count; reason\n"
             "where CUDA is not available.  Never raises.");
}

}  // namespace hopper_attention

// Reached only after `launch` or `load` has found the library.
using hopper_attention::cudart;

cudaError_t _cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption* options,
                                 void** values, unsigned count, cudaLibraryOption* library_options,
                                 void** library_values, unsigned library_count) {
  return cudart()->cudaLibraryLoadData(library, code, options, values, count, library_options,
                                       library_values, library_count);
}

cudaError_t _cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
  return cudart()->cudaLibraryGetKernel(kernel, library, name);
}

cudaError_t _cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute,
                                             int value, int device) {
  return cudart()->cudaKernelSetAttributeForDevice(kernel, attribute, value, device);
}

cudaError_t _cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  return cudart()->cudaFuncSetAttribute(kernel, attribute, value);
}

cudaError_t _cudaGetDevice(int* device) { return cudart()->cudaGetDevice(device); }

cudaError_t _cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return cudart()->cudaDeviceGetAttribute(value, attribute, device);
}

cudaError_t _cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel kernel,
                                  CUdevice device) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudart()->cudaGetDriverEntryPointByVersion(
      "cuKernelGetAttribute", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  // The driver's error codes are the runtime's.
  return static_cast<cudaError_t>(reinterpret_cast<decltype(&cuKernelGetAttribute)>(function)(
      value, attribute, kernel, device));
}

cudaError_t _cudaLaunchKernelEx(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  return cudart()->cudaLaunchKernelExC(config, kernel, parameters);
}
