// Loads each instance's module once, and once onto each device.
#pragma once

#include <cuda_runtime_api.h>

#include "registry.h"

namespace hopper_attention {

// After success the instance can be launched on `device`; after failure the next call tries again.
// Quick when there is nothing to do.  Blocks while another thread loads: call without the GIL, or
// where no other thread can wait for it.
cudaError_t ensure_loaded(const Instance&, int device);

}  // namespace hopper_attention
