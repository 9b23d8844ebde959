// Shared by the bindings of the norm ops on all devices: logical shapes, accumulation types, checks.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace megahp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline int64_t divided_up(int64_t all, int64_t part) { return (all + part - 1) / part; }

// Statistics and sums are fp32, or fp64 for fp64 input.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// x is [examples, ..., width]; `rows` is the product of the dimensions between.
struct NormShape {
  int64_t examples, rows, width;
};

inline NormShape norm_shape(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto dims = static_cast<int64_t>(sizes.size());
  NormShape shape{dims > 1 ? sizes[0] : 1, 1, sizes[dims - 1]};
  for (int64_t i = 1; i + 1 < dims; ++i) shape.rows *= sizes[i];
  return shape;
}

// Of mean and rstd, or rstd alone: one for each row.
inline std::vector<int64_t> statistics_sizes(const Tensor& x, bool centered) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end() - 1);
  sizes.insert(sizes.begin(), centered ? 2 : 1);
  return sizes;
}

inline void check_input(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "norm: x must be [..., D] with D >= 1");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1),
                  "norm: weight and bias must be [D] with D = ", x.size(-1), ", the last dimension of x");
}

inline void check_center(bool centered, bool bias) {
  STD_TORCH_CHECK(centered || !bias, "norm: a norm that is not centered has no bias");
}

inline void check_like(const Tensor& other, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(other.sizes().equals(x.sizes()), "norm: ", name, " and x must have the same shape");
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), "norm: ", name, " and x must have the same dtype");
}

inline void check_forward(const Tensor& x, const Optional& branch, const Tensor& weight, const Optional& bias,
                          bool centered) {
  check_input(x, weight);
  check_center(centered, bias.has_value());
  if (bias) check_input(x, *bias);
  if (branch) check_like(*branch, x, "branch");
}

inline void check_backward(const Tensor& dy, const Optional& dstream, const Tensor& x, const Tensor& weight,
                           const Tensor& statistics, bool centered, bool bias) {
  check_input(x, weight);
  check_center(centered, bias);
  check_like(dy, x, "dy");
  if (dstream) check_like(*dstream, x, "dstream");
  STD_TORCH_CHECK(statistics.sizes().equals(statistics_sizes(x, centered)) &&
                      statistics.scalar_type() == accumulate_type(x),
                  "norm backward: the statistics must be those the forward returned for x");
}

// Calls f with a value of the C++ type of x.
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "norm: x must be float32, float64, bfloat16 or float16");
  }
}

}  // namespace megahp
