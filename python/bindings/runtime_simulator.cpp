// The runtime without a GPU: hands every launch to a Python callable, answers like one H200.
#include <algorithm>
#include <cstring>
#include <exception>

#include "loader.h"
#include "runtime.h"

namespace py = pybind11;

namespace hopper_attention {
namespace {

constexpr std::size_t max_shared_memory = 227 * 1024;

// Leaked on purpose: destroying it after the interpreter has gone would crash.
py::object& handler() {
  static auto* object = new py::object(py::none());
  return *object;
}

// What a launch raised, until control is back outside the exported host code.
thread_local std::exception_ptr raised;

void set_launch_handler(py::object callable) {
  if (!callable.is_none() && !PyCallable_Check(callable.ptr()))
    throw py::type_error("the launch handler must be callable or None");
  handler() = std::move(callable);
}

py::tuple triple(unsigned x, unsigned y, unsigned z) { return py::make_tuple(x, y, z); }

py::tuple cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = config.attrs[i].val.clusterDim;
    return triple(cluster.x, cluster.y, cluster.z);
  }
  return triple(1, 1, 1);
}

// The limits that a GPU would refuse a launch for.
cudaError_t check(const cudaLaunchConfig_t& config) {
  const auto& [gx, gy, gz] = config.gridDim;
  const auto& [bx, by, bz] = config.blockDim;
  if (gx == 0 || gy == 0 || gz == 0 || gx > 0x7fffffffu || gy > 65535u || gz > 65535u)
    return cudaErrorInvalidConfiguration;
  if (bx == 0 || by == 0 || bz == 0 || std::size_t{bx} * by * bz > 1024)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > max_shared_memory) return cudaErrorInvalidValue;
  return cudaSuccess;
}

void call_handler(const cudaLaunchConfig_t& config, const Kernel& kernel, void** parameters) {
  if (handler().is_none())
    throw std::runtime_error("no simulator is attached: set_launch_handler was not called");
  py::list addresses(kernel.parameters);
  for (int i = 0; i < kernel.parameters; ++i)
    addresses[i] = reinterpret_cast<std::uintptr_t>(parameters[i]);
  handler()(kernel.symbol, triple(config.gridDim.x, config.gridDim.y, config.gridDim.z),
            triple(config.blockDim.x, config.blockDim.y, config.blockDim.z), cluster_of(config),
            config.dynamicSmemBytes, addresses);
}

void require(cudaError_t error) {
  if (error != cudaSuccess) throw RuntimeFailure(describe(error));
}

}  // namespace

std::string describe(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue: invalid argument";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration: invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice: invalid device ordinal";
    case cudaErrorSymbolNotFound:
      return "cudaErrorSymbolNotFound: named symbol not found";
    default:
      return "CUDA error " + std::to_string(static_cast<int>(error));
  }
}

void load(const Instance& instance, int device) { require(ensure_loaded(instance, device)); }

void launch(const Instance& instance, int device, PackedArguments& arguments) {
  load(instance, device);
  raised = nullptr;
  const auto error = static_cast<cudaError_t>(arguments.call(instance));
  if (raised) std::rethrow_exception(std::exchange(raised, nullptr));
  require(error);
}

void add_functions(py::module_& module) {
  module.def("set_launch_handler", &set_launch_handler, py::arg("handler"),
             "Call handler(kernel_name, grid, block, cluster, shared_memory_bytes,\n"
             "parameter_addresses) for every launch; None detaches.");
}

}  // namespace hopper_attention

using hopper_attention::Kernel;

// A kernel's handle is its entry in the registry.

cudaError_t _cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**,
                                 unsigned, cudaLibraryOption*, void**, unsigned) {
  *library = static_cast<cudaLibrary_t>(const_cast<void*>(code));
  return cudaSuccess;
}

cudaError_t _cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  for (std::size_t i = 0; i < hopper_attention::instance_count; ++i) {
    const auto& instance = hopper_attention::instances[i];
    const Kernel* end = instance.kernels + instance.kernel_count;
    const Kernel* found = std::find_if(instance.kernels, end, [&](const Kernel& candidate) {
      return std::strcmp(candidate.symbol, name) == 0;
    });
    if (found == end) continue;
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<Kernel*>(found));
    return cudaSuccess;
  }
  return cudaErrorSymbolNotFound;
}

cudaError_t _cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
  return cudaSuccess;
}

cudaError_t _cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t _cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t _cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = hopper_attention::max_shared_memory;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t _cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel, CUdevice) {
  if (attribute != CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES) return cudaErrorInvalidValue;
  *value = 0;  // the DSL allocates shared memory dynamically, always
  return cudaSuccess;
}

cudaError_t _cudaLaunchKernelEx(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  if (const cudaError_t error = hopper_attention::check(*config)) return error;
  try {
    hopper_attention::call_handler(*config, *static_cast<const Kernel*>(kernel), parameters);
    return cudaSuccess;
  } catch (...) {
    hopper_attention::raised = std::current_exception();
    return cudaErrorLaunchFailure;
  }
}
