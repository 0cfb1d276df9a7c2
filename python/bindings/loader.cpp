// Loads each instance's module once, and once onto each device.
#include "loader.h"

#include <atomic>
#include <mutex>
#include <vector>

namespace hopper_attention {
namespace {

constexpr int max_devices = 64;

struct State {
  cudaLibrary_t library = nullptr;
  std::atomic<std::uint64_t> devices{0};  // a bit for each device it is loaded on
};

State& state_of(const Instance& instance) {
  static std::vector<State> states(instance_count);
  return states[&instance - instances];
}

}  // namespace

cudaError_t ensure_loaded(const Instance& instance, int device) {
  if (device < 0 || device >= max_devices) return cudaErrorInvalidDevice;
  State& state = state_of(instance);
  const std::uint64_t bit = std::uint64_t{1} << device;
  if (state.devices.load(std::memory_order_acquire) & bit) return cudaSuccess;

  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (state.devices.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  cudaError_t result = cudaSuccess;
  if (state.library == nullptr) {
    cudaLibrary_t loaded = nullptr;
    cudaLibrary_t* library = &loaded;
    void* arguments[] = {&library, &result};
    instance.load_library(arguments);
    if (result != cudaSuccess) return result;
    state.library = loaded;
  }
  cudaLibrary_t* library = &state.library;
  void* arguments[] = {&library, &device, &result};
  instance.load_to_device(arguments);
  if (result == cudaSuccess) state.devices.fetch_or(bit, std::memory_order_release);
  return result;
}

}  // namespace hopper_attention
