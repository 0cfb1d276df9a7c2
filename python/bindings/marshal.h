// Python tensors and scalars -> what an instance's host code takes, checked against the registry.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "registry.h"

namespace hopper_attention {

// Arguments of one call.  Holds pointers into itself: neither copied nor moved.
class PackedArguments {
 public:
  // `tensors`: a sequence of (address, shape, strides), `scalars`: one of numbers, both in the order
  // of the instance's arguments.  Throws TypeError or ValueError naming instance and argument.
  PackedArguments(const Instance&, pybind11::handle tensors, pybind11::handle scalars,
                  std::uintptr_t stream);
  PackedArguments(const PackedArguments&) = delete;
  PackedArguments& operator=(const PackedArguments&) = delete;

  // Call the instance's host code; returns its result, a cudaError_t.
  int call(const Instance& instance);

 private:
  // What the host code reads of a tensor: address, then dynamic shapes, then dynamic strides.
  struct alignas(8) Tensor {
    unsigned char bytes[8 * (1 + 2 * max_rank)];
  };

  Tensor tensors_[max_arguments];
  std::uint64_t scalars_[max_arguments];
  std::uintptr_t stream_;
  std::int32_t result_ = 0;
  void* pointers_[max_arguments + 2];
  int count_ = 0;
};

// "q (2, 128, 4, 64), k ..." for error messages; `tensors` has been packed before.
std::string describe_tensors(const Instance&, pybind11::handle tensors);

}  // namespace hopper_attention
