// The functions that exported host code imports, and what the bindings ask of a runtime.
// Two implementations: runtime_cuda.cpp launches on a GPU, runtime_simulator.cpp calls Python.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "marshal.h"
#include "registry.h"

// The CUDA runtime's functions with an underscore before their names.  They are called from frames
// that cannot unwind: no exception may leave them.
extern "C" {
cudaError_t _cudaLibraryLoadData(cudaLibrary_t*, const void* code, cudaJitOption*, void**, unsigned,
                                 cudaLibraryOption*, void**, unsigned);
cudaError_t _cudaLibraryGetKernel(cudaKernel_t*, cudaLibrary_t, const char* name);
cudaError_t _cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int value, int device);
cudaError_t _cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t _cudaGetDevice(int* device);
cudaError_t _cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t _cuKernelGetAttribute(int* value, CUfunction_attribute, CUkernel, CUdevice);
cudaError_t _cudaLaunchKernelEx(const cudaLaunchConfig_t*, const void* kernel, void** parameters);
}

namespace hopper_attention {

// A call of the runtime that failed; the bindings add instance and shapes.
struct RuntimeFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "cudaErrorInvalidValue: invalid argument"
std::string describe(cudaError_t);

// Load the instance's module on the device, so that a later launch does not.
void load(const Instance&, int device);

// Launch on the device; loads first where that has not happened.  Called with the GIL held.
void launch(const Instance&, int device, PackedArguments&);

// Functions that only this runtime's extension module has.
void add_functions(pybind11::module_&);

}  // namespace hopper_attention
