// Packing with the CPython API: pybind11's casters would cost more than the launch.
#include "marshal.h"

#include <cstring>
#include <limits>

namespace py = pybind11;

namespace hopper_attention {
namespace {

// Where an error happened; building the text costs nothing until there is one.
struct Place {
  const Instance& instance;
  const Argument& argument;
  const char* part = nullptr;
  int mode = -1;

  std::string text() const {
    std::string text = std::string(instance.name) + ": argument " + argument.name;
    if (part) text += std::string(", ") + part;
    if (mode >= 0) text += "[" + std::to_string(mode) + "]";
    return text;
  }
};

// A list or tuple, borrowed: no items are copied.
class Sequence {
 public:
  explicit Sequence(PyObject* object) : object_(object) {}
  static bool is_one(PyObject* object) { return PyList_Check(object) || PyTuple_Check(object); }
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(object_); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(object_, i); }

 private:
  PyObject* object_;
};

[[noreturn]] void refuse_sequence(PyObject* object, const std::string& what) {
  throw py::type_error(what + " must be a list or tuple, not " + Py_TYPE(object)->tp_name);
}

Sequence modes_of(PyObject* tensor, int item, const Place& place) {
  PyObject* object = PyTuple_GET_ITEM(tensor, item);
  if (!Sequence::is_one(object)) refuse_sequence(object, place.text());
  return Sequence(object);
}

Sequence all_of(py::handle object, const Instance& instance, const char* what) {
  if (!Sequence::is_one(object.ptr()))
    refuse_sequence(object.ptr(), std::string(instance.name) + ": " + what);
  return Sequence(object.ptr());
}

std::int64_t to_integer(PyObject* object, const Place& place) {
  std::int64_t value = -1;
  if (PyLong_CheckExact(object)) {
    value = PyLong_AsLongLong(object);
  } else if (PyObject* index = PyIndex_Check(object) ? PyNumber_Index(object) : nullptr) {
    value = PyLong_AsLongLong(index);
    Py_DECREF(index);
  } else {
    PyErr_Clear();
    throw py::type_error(place.text() + ": expected an integer, not " + Py_TYPE(object)->tp_name);
  }
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::value_error(place.text() + ": does not fit 64 bits");
  }
  return value;
}

void check_range(std::int64_t value, int bits, const Place& place) {
  if (bits == 32 && (value < std::numeric_limits<std::int32_t>::min() ||
                     value > std::numeric_limits<std::int32_t>::max()))
    throw py::value_error(place.text() + ": " + std::to_string(value) + " does not fit 32 bits");
}

void check_mode(std::int64_t value, const Mode& mode, const Place& place) {
  if (mode.value == dynamic) {
    if (mode.divisor > 1 && value % mode.divisor != 0)
      throw py::value_error(place.text() + ": " + std::to_string(value) + " is not a multiple of " +
                            std::to_string(mode.divisor));
  } else if (value != mode.value) {
    throw py::value_error(place.text() + ": " + std::to_string(value) +
                          ", but the kernel was compiled for " + std::to_string(mode.value));
  }
}

unsigned char* put(unsigned char* end, std::int64_t value, int bits) {
  if (bits == 32) {
    const auto narrow = static_cast<std::int32_t>(value);
    std::memcpy(end, &narrow, sizeof narrow);
    return end + sizeof narrow;
  }
  std::memcpy(end, &value, sizeof value);
  return end + sizeof value;
}

void pack_tensor(const Instance& instance, const Argument& argument, PyObject* object,
                 unsigned char* bytes) {
  const Place place{instance, argument};
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 3)
    throw py::type_error(place.text() + ": expected (address, shape, strides)");
  const Sequence shape = modes_of(object, 1, {instance, argument, "shape"});
  const Sequence strides = modes_of(object, 2, {instance, argument, "strides"});
  if (shape.size() != argument.rank || strides.size() != argument.rank)
    throw py::value_error(place.text() + ": expected " + std::to_string(argument.rank) +
                          " dimensions, got " + std::to_string(shape.size()) + " extents and " +
                          std::to_string(strides.size()) + " strides");

  // An address has 64 unsigned bits: tagged pointers may set the highest.
  PyObject* address_object = PyTuple_GET_ITEM(object, 0);
  if (!PyLong_Check(address_object))
    throw py::type_error(place.text() + ": address must be an int");
  const std::uint64_t address = PyLong_AsUnsignedLongLongMask(address_object);
  if (address % argument.alignment != 0)
    throw py::value_error(place.text() + ": address is not aligned to " +
                          std::to_string(argument.alignment) + " bytes");
  std::memcpy(bytes, &address, sizeof address);

  std::int64_t extents[max_rank];
  unsigned char* end = bytes + sizeof address;
  for (int i = 0; i < argument.rank; ++i) {
    const Place at{instance, argument, "shape", i};
    const std::int64_t extent = extents[i] = to_integer(shape[i], at);
    if (extent < 0) throw py::value_error(at.text() + ": negative extent");
    check_range(extent, argument.shape_bits, at);
    check_mode(extent, argument.shape[i], at);
    if (argument.shape[i].value == dynamic) end = put(end, extent, argument.shape_bits);
  }
  if (argument.stride_bits == 64) end = bytes + (end - bytes + 7) / 8 * 8;
  for (int i = 0; i < argument.rank; ++i) {
    const Place at{instance, argument, "strides", i};
    const std::int64_t stride = to_integer(strides[i], at);
    check_range(stride, argument.stride_bits, at);
    // The stride of an extent of 0 or 1 is never multiplied by anything but 0.
    if (extents[i] > 1) check_mode(stride, argument.stride[i], at);
    if (argument.stride[i].value == dynamic) end = put(end, stride, argument.stride_bits);
  }
}

double to_real(PyObject* object, const Place& place) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(place.text() + ": expected a number, not " + Py_TYPE(object)->tp_name);
  }
  return value;
}

void pack_scalar(const Instance& instance, const Argument& argument, PyObject* object,
                 std::uint64_t* slot) {
  const Place place{instance, argument};
  switch (argument.kind) {
    case Kind::float32: {
      const auto value = static_cast<float>(to_real(object, place));
      std::memcpy(slot, &value, sizeof value);
      return;
    }
    case Kind::float64: {
      const double value = to_real(object, place);
      std::memcpy(slot, &value, sizeof value);
      return;
    }
    case Kind::int32: {
      const std::int64_t value = to_integer(object, place);
      check_range(value, 32, place);
      put(reinterpret_cast<unsigned char*>(slot), value, 32);
      return;
    }
    case Kind::int64:
      put(reinterpret_cast<unsigned char*>(slot), to_integer(object, place), 64);
      return;
    case Kind::uint8: {
      const std::int64_t value = to_integer(object, place);
      if (value < 0 || value > 255)
        throw py::value_error(place.text() + ": " + std::to_string(value) + " does not fit 8 bits");
      *reinterpret_cast<std::uint8_t*>(slot) = static_cast<std::uint8_t>(value);
      return;
    }
    case Kind::tensor:
      break;  // packed by pack_tensor
  }
}

int count_tensors(const Instance& instance) {
  int count = 0;
  for (int i = 0; i < instance.argument_count; ++i)
    count += instance.arguments[i].kind == Kind::tensor;
  return count;
}

void check_count(const Instance& instance, const char* what, Py_ssize_t given, int expected) {
  if (given != expected)
    throw py::type_error(std::string(instance.name) + ": expected " + std::to_string(expected) +
                         " " + what + ", got " + std::to_string(given));
}

}  // namespace

PackedArguments::PackedArguments(const Instance& instance, py::handle tensors, py::handle scalars,
                                 std::uintptr_t stream)
    : stream_(stream) {
  const Sequence given_tensors = all_of(tensors, instance, "tensors");
  const Sequence given_scalars = all_of(scalars, instance, "scalars");
  const int expected = count_tensors(instance);
  check_count(instance, "tensors", given_tensors.size(), expected);
  check_count(instance, "scalars", given_scalars.size(), instance.argument_count - expected);
  int tensor = 0, scalar = 0;
  for (int i = 0; i < instance.argument_count; ++i) {
    const Argument& argument = instance.arguments[i];
    if (argument.kind == Kind::tensor) {
      pack_tensor(instance, argument, given_tensors[tensor], tensors_[tensor].bytes);
      pointers_[count_++] = &tensors_[tensor++];
    } else {
      pack_scalar(instance, argument, given_scalars[scalar], &scalars_[scalar]);
      pointers_[count_++] = &scalars_[scalar++];
    }
  }
  pointers_[count_++] = &stream_;
  pointers_[count_++] = &result_;
}

int PackedArguments::call(const Instance& instance) {
  instance.call(pointers_, count_);
  return result_;
}

std::string describe_tensors(const Instance& instance, py::handle tensors) {
  std::string text;
  Py_ssize_t tensor = 0;
  for (int i = 0; i < instance.argument_count; ++i) {
    if (instance.arguments[i].kind != Kind::tensor) continue;
    const py::handle shape = PyTuple_GET_ITEM(PySequence_Fast_GET_ITEM(tensors.ptr(), tensor), 1);
    text += (tensor++ ? ", " : "") + std::string(instance.arguments[i].name) + " " +
            std::string(py::str(py::tuple(py::reinterpret_borrow<py::object>(shape))));
  }
  return text;
}

}  // namespace hopper_attention
