// A libcudart that records what it is asked to do, for test_build_cudart.py.  Two devices.
#include <cstdio>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

namespace {
thread_local int current = 0;
int failing_launches = 0;
int failing_loads = 0;

// Its lines stand between those that Python prints.
const int unbuffered = std::setvbuf(stdout, nullptr, _IONBF, 0);
}  // namespace

// The layout of cudaLaunchConfig_t.
struct Config {
  unsigned grid[3], block[3];
  unsigned long dynamic_shared_memory;
  void* stream;
};

API void fail_launches(int count) { failing_launches = count; }
API void fail_loads(int count) { failing_loads = count; }
API int cudaGetDevice(int* device) { return *device = current, 0; }
API int cudaSetDevice(int device) {
  std::printf("set device %d\n", device);
  if (device >= 2) return 101;
  return current = device, 0;
}
API int cudaGetDeviceCount(int* count) { return *count = 2, 0; }
API int cudaDriverGetVersion(int* version) { return *version = 13010, 0; }
API int cudaRuntimeGetVersion(int* version) { return *version = 13000, 0; }
API const char* cudaGetErrorName(int error) {
  return error == 101   ? "cudaErrorInvalidDevice"
         : error == 200 ? "cudaErrorInvalidKernelImage"
                        : "cudaErrorLaunchOutOfResources";
}
API const char* cudaGetErrorString(int error) {
  return error == 101   ? "invalid device ordinal"
         : error == 200 ? "device kernel image is invalid"
                        : "too many resources requested for launch";
}
API int cudaLibraryLoadData(void** library, const void*, void*, void**, unsigned, void*, void**,
                            unsigned) {
  if (failing_loads > 0) return --failing_loads, 200;
  std::printf("load library\n");
  return *library = &current, 0;
}
API int cudaLibraryGetKernel(void** kernel, void*, const char* name) {
  std::printf("get kernel %s\n", name);
  return *kernel = &failing_launches, 0;
}
API int cudaKernelSetAttributeForDevice(void*, int attribute, int value, int device) {
  std::printf("attribute %d = %d on device %d\n", attribute, value, device);
  return 0;
}
API int cudaFuncSetAttribute(const void*, int, int) { return 0; }
API int cudaDeviceGetAttribute(int* value, int, int) { return *value = 232448, 0; }
int kernel_attribute(int* value, int, void*, int) { return *value = 0, 0; }
API int cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                         unsigned long long, int* found) {
  *function = reinterpret_cast<void*>(&kernel_attribute);
  *found = 0;
  return std::strcmp(symbol, "cuKernelGetAttribute") == 0 ? 0 : 500;
}
API int cudaLaunchKernelExC(const Config* config, const void*, void** parameters) {
  if (failing_launches > 0) return --failing_launches, 701;
  std::printf("launch on device %d stream %p block %u shared memory %lu\n", current, config->stream,
              config->block[0], config->dynamic_shared_memory);
  return parameters[0] == nullptr;
}
