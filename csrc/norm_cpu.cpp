// The norm ops on the CPU: binding, threads, order of summation. Their schemas are in megahp/ops/norm.py.
#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "norm.h"
#include "norm_rows.h"

namespace megahp {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;

// Rows of one example whose gradients are summed in one go: fixed, so that no result depends on the threads.
constexpr int64_t kChunk = 64;

// How many rows, or chunks of rows, are worth waking a thread for.
int64_t grain(int64_t elements_of_one) { return std::max<int64_t>(1, 32768 / elements_of_one); }

Tensor prepared(const Tensor& weight, ScalarType dtype) {
  return contiguous(torch::stable::to(weight, dtype));
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// RMSNorm (not centered) has neither mean nor bias. Below, other tensors stand in their place, which the row
// functions do not touch.

template <bool centered>
std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, const Tensor& weight,
                                             const std::optional<Tensor>& bias, double eps) {
  check_input(input, weight);
  if (bias) check_input(input, *bias);
  const auto dtype = accumulate_type(input);
  const NormShape shape = norm_shape(input);
  const Tensor x = contiguous(input);
  const Tensor w = prepared(weight, dtype);
  const Tensor b = !centered ? w : bias ? prepared(*bias, dtype) : new_zeros(w, w.sizes());
  const Tensor y = new_empty(x, x.sizes());
  const Tensor rstd = new_empty(x, leading_sizes(x), dtype);
  const Tensor mean = centered ? new_empty(rstd, rstd.sizes()) : rstd;

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    parallel_for(0, shape.examples * shape.rows, grain(shape.width), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * shape.width;
      normalize_rows<centered, T, A>(end - begin, shape.width, static_cast<A>(eps), data<T>(x) + at,
                                     data<A>(w), data<A>(b), mutable_data<T>(y) + at,
                                     mutable_data<A>(mean) + begin, mutable_data<A>(rstd) + begin);
    });
  });
  return {y, mean, rstd};
}

template <bool centered>
std::tuple<Tensor, Tensor, Tensor> differentiate(const Tensor& gradient, const Tensor& input,
                                                 const Tensor& weight, const Tensor& mean,
                                                 const Tensor& rstd) {
  check_input(input, weight);
  check_gradient(gradient, input);
  check_statistic(mean, input);
  check_statistic(rstd, input);
  const NormShape shape = norm_shape(input);
  const int64_t chunks = (shape.rows + kChunk - 1) / kChunk;
  const Tensor dy = contiguous(gradient);
  const Tensor x = contiguous(input);
  const Tensor w = prepared(weight, accumulate_type(input));
  const Tensor m = contiguous(mean);
  const Tensor r = contiguous(rstd);
  const Tensor dx = new_empty(x, x.sizes());
  const Tensor dweights = new_empty(w, {shape.examples, chunks, shape.width});
  const Tensor dbiases = centered ? new_empty(w, dweights.sizes()) : dweights;

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    parallel_for(0, shape.examples * chunks, grain(kChunk * shape.width), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t skipped = chunk % chunks * kChunk;
        const int64_t row = chunk / chunks * shape.rows + skipped;
        const int64_t at = row * shape.width;
        const int64_t sums = chunk * shape.width;
        differentiate_rows<centered, T, A>(
            std::min(kChunk, shape.rows - skipped), shape.width, data<T>(dy) + at, data<T>(x) + at,
            data<A>(w), data<A>(m) + row, data<A>(r) + row, mutable_data<T>(dx) + at,
            mutable_data<A>(dweights) + sums, mutable_data<A>(dbiases) + sums);
      }
    });
  });

  const std::vector<int64_t> over_chunks{1};
  const Tensor dweight = torch::stable::sum(dweights, over_chunks);
  return {dx, dweight, centered ? torch::stable::sum(dbiases, over_chunks) : dweight};
}

// The forward ops ignore `probe` and `group`, which are the backward's. A string is taken as the handle it
// comes as: its conversion to std::string leaks one string a call (torch 2.13, ToImpl<std::string>).
void ignore(StringHandle group) { torch_delete_string(group); }

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&,
                                    double eps, StringHandle group) {
  ignore(group);
  const auto [y, mean, rstd] = normalize<false>(x, weight, std::nullopt, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight,
                                              const std::optional<Tensor>& bias, const std::optional<Tensor>&,
                                              double eps, StringHandle group) {
  ignore(group);
  return normalize<true>(x, weight, bias, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd) {
  const auto [dx, dweight, dbias] = differentiate<false>(dy, x, weight, rstd, rstd);
  return {dx, dweight};
}

}  // namespace
}  // namespace megahp

STABLE_TORCH_LIBRARY_IMPL(megahp, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&megahp::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&megahp::rms_norm_backward));
  m.impl("layer_norm", TORCH_BOX(&megahp::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&megahp::differentiate<true>));
}
