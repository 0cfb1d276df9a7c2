// The CUDA runtime library, found and opened at first use: the extension imports without it.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

namespace hopper_attention {

// Every function of libcudart in use.
#define HOPPER_ATTENTION_CUDART_FUNCTIONS(F) \
  F(cudaDeviceGetAttribute)                  \
  F(cudaDriverGetVersion)                    \
  F(cudaFuncSetAttribute)                    \
  F(cudaGetDevice)                           \
  F(cudaGetDeviceCount)                      \
  F(cudaGetDriverEntryPointByVersion)        \
  F(cudaGetErrorName)                        \
  F(cudaGetErrorString)                      \
  F(cudaKernelSetAttributeForDevice)         \
  F(cudaLaunchKernelExC)                     \
  F(cudaLibraryGetKernel)                    \
  F(cudaLibraryLoadData)                     \
  F(cudaRuntimeGetVersion)                   \
  F(cudaSetDevice)

struct Cudart {
  std::string path;
#define F(name) decltype(&::name) name = nullptr;
  HOPPER_ATTENTION_CUDART_FUNCTIONS(F)
#undef F
};

// The library, or null where there is none (`cudart_missing` says why).  The first call needs the GIL.
const Cudart* cudart();
const std::string& cudart_missing();

}  // namespace hopper_attention
