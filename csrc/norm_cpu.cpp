// The norm ops on the CPU: binding, threads, order of summation. Their schemas are in megahp/ops/norm.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/csrc/stable/library.h>

#include "norm.h"

namespace megahp {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::parallel_for;

// Independent partial sums of a row, which hide the latency of an addition.
constexpr int kSums = 4;
#define MEGAHP_INLINE [[gnu::always_inline]] inline
#define MEGAHP_LAMBDA __attribute__((always_inline))

namespace baseline {
#define MEGAHP_VECTOR_BYTES 16
#include "norm_rows.h"
#undef MEGAHP_VECTOR_BYTES
}  // namespace baseline

// Instruction sets beyond the compiler's target. Which one is used is decided when the object loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#define MEGAHP_VECTOR_BYTES 32
#include "norm_rows.h"
#undef MEGAHP_VECTOR_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
namespace avx512 {
#define MEGAHP_VECTOR_BYTES 64
#include "norm_rows.h"
#undef MEGAHP_VECTOR_BYTES
}  // namespace avx512
#pragma GCC pop_options

enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best one available, or the one that torch's variable ATEN_CPU_CAPABILITY asks for, if available.
InstructionSet best_instruction_set() {
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view asked = variable ? variable : "";
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx2 || asked == "default") return InstructionSet::kBaseline;
  return avx512 && asked != "avx2" ? InstructionSet::kAvx512 : InstructionSet::kAvx2;
}

const InstructionSet kInstructionSet = best_instruction_set();

#define MEGAHP_BEST(...)                                        \
  (kInstructionSet == InstructionSet::kAvx512 ? &avx512::__VA_ARGS__ \
   : kInstructionSet == InstructionSet::kAvx2 ? &avx2::__VA_ARGS__   \
                                              : &baseline::__VA_ARGS__)
#else
#define MEGAHP_BEST(...) (&baseline::__VA_ARGS__)
#endif

// Rows of one example whose gradients are summed together, and columns whose squares are: fixed, so that no result
// depends on the number of threads.
constexpr int64_t kChunk = 64;
constexpr int64_t kColumns = 256;

// Units of work that are worth waking a thread for.
int64_t grain(int64_t elements_of_one) { return std::max<int64_t>(1, 32768 / elements_of_one); }

Tensor prepared(const Tensor& weight, ScalarType dtype) {
  return contiguous(weight.scalar_type() == dtype ? weight : torch::stable::to(weight, dtype));
}

// RMSNorm (not centered) has neither mean nor bias, and there is a stream only where a branch is added to x. Other
// tensors are passed in place of missing ones; the row functions do not touch them.

// `probe` and `group` matter to the backward alone. A string is taken as an opaque handle, since its conversion to
// std::string leaks one string a call (torch 2.13, ToImpl<std::string>).
std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& input, const Optional& added, double alpha, const Tensor& weight,
                                        const Optional& bias, const Optional&, bool centered, double eps,
                                        StringHandle group) {
  torch_delete_string(group);
  check_forward(input, added, weight, bias, centered);
  const auto dtype = accumulate_type(input);
  const NormShape shape = norm_shape(input);
  const int64_t rows = shape.examples * shape.rows;
  const Tensor x = contiguous(input);
  const Tensor branch = added ? contiguous(*added) : x;
  const Tensor w = prepared(weight, dtype);
  const Tensor b = !centered ? w : bias ? prepared(*bias, dtype) : torch::stable::new_zeros(w, w.sizes());
  const Tensor y = new_empty(x, x.sizes());
  const Tensor stream = added ? new_empty(x, x.sizes()) : new_empty(x, {0});
  const Tensor statistics = new_empty(x, statistics_sizes(x, centered), dtype);

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const auto normalize = centered ? added ? MEGAHP_BEST(normalize_rows<true, true, T, A>)
                                            : MEGAHP_BEST(normalize_rows<true, false, T, A>)
                           : added  ? MEGAHP_BEST(normalize_rows<false, true, T, A>)
                                    : MEGAHP_BEST(normalize_rows<false, false, T, A>);
    T* const s = mutable_data<T>(added ? stream : y);
    A* const mean = mutable_data<A>(statistics);
    A* const rstd = centered ? mean + rows : mean;
    parallel_for(0, rows, grain(shape.width), [&](int64_t begin, int64_t end) {
      const int64_t at = begin * shape.width;
      normalize(end - begin, shape.width, static_cast<A>(alpha), static_cast<A>(eps), data<T>(x) + at,
                data<T>(branch) + at, data<A>(w), data<A>(b), s + at, mutable_data<T>(y) + at, mean + begin,
                rstd + begin);
    });
  });
  return {stream, y, statistics};
}

// partial [examples, parts, width] -> the gradient, [width] or by example, and the sum of squares, which `squares`
// is set to or increased by.
template <class A>
Tensor sum_examples(const Tensor& partial, bool by_example, A& squares) {
  const int64_t examples = partial.size(0), parts = partial.size(1), width = partial.size(2);
  const Tensor gradient = by_example ? new_empty(partial, {examples, width}) : new_empty(partial, {width});
  const auto sum_columns = MEGAHP_BEST(sum_examples<A>);
  std::vector<A> several(divided_up(width, kColumns));
  const int64_t blocks = static_cast<int64_t>(several.size());
  const int64_t elements = std::max<int64_t>(1, examples * parts * kColumns);
  parallel_for(0, blocks, grain(elements), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      several[block] = sum_columns(examples, parts, width, block * kColumns,
                                   std::min(width, (block + 1) * kColumns), by_example, data<A>(partial),
                                   mutable_data<A>(gradient));
  });
  for (const A one : several) squares += one;
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& gradient, const Optional& stream_gradient,
                                                         const Tensor& input, const Tensor& weight,
                                                         const Tensor& statistics, bool centered, bool by_example,
                                                         bool bias) {
  check_backward(gradient, stream_gradient, input, weight, statistics, centered, bias);
  const NormShape shape = norm_shape(input);
  const int64_t chunks = divided_up(shape.rows, kChunk);
  const Tensor dy = contiguous(gradient);
  const Tensor dstream = stream_gradient ? contiguous(*stream_gradient) : dy;
  const Tensor x = contiguous(input);
  const Tensor w = prepared(weight, accumulate_type(input));
  const Tensor s = contiguous(statistics);
  const Tensor dx = new_empty(x, x.sizes());
  const Tensor dweights = new_empty(w, {shape.examples, chunks, shape.width});
  const Tensor dbiases = centered ? new_empty(w, dweights.sizes()) : dweights;
  const Tensor squares = new_empty(w, {});
  Tensor dweight = w, dbias = w;

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const auto differentiate = centered ? stream_gradient ? MEGAHP_BEST(differentiate_rows<true, true, T, A>)
                                                          : MEGAHP_BEST(differentiate_rows<true, false, T, A>)
                               : stream_gradient ? MEGAHP_BEST(differentiate_rows<false, true, T, A>)
                                                 : MEGAHP_BEST(differentiate_rows<false, false, T, A>);
    const A* const mean = data<A>(s);
    const A* const rstd = centered ? mean + shape.examples * shape.rows : mean;
    parallel_for(0, shape.examples * chunks, grain(kChunk * shape.width), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t skipped = chunk % chunks * kChunk;
        const int64_t row = chunk / chunks * shape.rows + skipped;
        const int64_t at = row * shape.width;
        const int64_t sums = chunk * shape.width;
        differentiate(std::min(kChunk, shape.rows - skipped), shape.width, data<T>(dy) + at, data<T>(dstream) + at,
                      data<T>(x) + at, data<A>(w), mean + row, rstd + row, mutable_data<T>(dx) + at,
                      mutable_data<A>(dweights) + sums, mutable_data<A>(dbiases) + sums);
      }
    });
    A sum = 0;
    dweight = sum_examples<A>(dweights, by_example, sum);
    dbias = bias ? sum_examples<A>(dbiases, by_example, sum) : new_empty(w, {0});
    *mutable_data<A>(squares) = by_example ? 0 : sum;
  });
  return {dx, dweight, dbias, squares};
}

}  // namespace
}  // namespace megahp

STABLE_TORCH_LIBRARY_IMPL(megahp, CPU, m) {
  m.impl("norm", TORCH_BOX(&megahp::norm));
  m.impl("norm_backward", TORCH_BOX(&megahp::norm_backward));
}
