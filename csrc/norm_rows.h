// The arithmetic of LayerNorm and RMSNorm on contiguous rows: RMSNorm is LayerNorm with a mean of zero.
//
// No libtorch here: T is the type of the data, A that of statistics, weights and sums.
#pragma once

#include <cmath>
#include <cstdint>

// One clone of a function per instruction set, chosen as the object is loaded (which takes glibc).
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define MEGAHP_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGAHP_CLONES
#endif

namespace megahp {

// slot = value, rounded. 16-bit floats are stored by their bits: GCC would not vectorise copies of structs.
template <class T, class A>
inline void store(T& slot, A value) {
  const T rounded(value);
  if constexpr (requires { slot.x; })
    slot.x = rounded.x;
  else
    slot = rounded;
}

// y = (x - mean) rstd weight + bias, for `rows` rows of `width`.
template <bool centered, class T, class A>
MEGAHP_CLONES void normalize_rows(int64_t rows, int64_t width, A eps, const T* x, const A* weight,
                                  const A* bias, T* y, A* mean, A* rstd) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    A center = 0;
    if constexpr (centered) {
#pragma omp simd reduction(+ : center)
      for (int64_t i = 0; i < width; ++i) center += static_cast<A>(x[i]);
      mean[row] = center /= width;
    }
    A squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) {
      const A deviation = static_cast<A>(x[i]) - center;
      squares += deviation * deviation;
    }
    const A scale = rstd[row] = 1 / std::sqrt(squares / width + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      A value = (static_cast<A>(x[i]) - center) * scale * weight[i];
      if constexpr (centered) value += bias[i];
      store(y[i], value);
    }
  }
}

// With n = (x - mean) rstd and g = dy weight, in each row
//     dx = (g - average(g) - n average(g n)) rstd      (RMSNorm: without average(g)),
// and over the rows dweight = sum(dy n), dbias = sum(dy). dweight and dbias are written, not added to.
template <bool centered, class T, class A>
MEGAHP_CLONES void differentiate_rows(int64_t rows, int64_t width, const T* dy, const T* x, const A* weight,
                                      const A* mean, const A* rstd, T* dx, A* dweight, A* dbias) {
  for (int64_t i = 0; i < width; ++i) dweight[i] = 0;
  if constexpr (centered)
    for (int64_t i = 0; i < width; ++i) dbias[i] = 0;

  for (int64_t row = 0; row < rows; ++row, dy += width, x += width, dx += width) {
    A center = 0, sum = 0, projection = 0;
    if constexpr (centered) center = mean[row];
    const A scale = rstd[row];
#pragma omp simd reduction(+ : sum, projection)
    for (int64_t i = 0; i < width; ++i) {
      const A d = static_cast<A>(dy[i]);
      const A product = d * (static_cast<A>(x[i]) - center) * scale;
      dweight[i] += product;
      projection += product * weight[i];
      if constexpr (centered) {
        dbias[i] += d;
        sum += d * weight[i];
      }
    }
    sum /= width;
    projection /= width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const A normal = (static_cast<A>(x[i]) - center) * scale;
      store(dx[i], (static_cast<A>(dy[i]) * weight[i] - sum - normal * projection) * scale);
    }
  }
}

}  // namespace megahp
