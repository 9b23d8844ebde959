// The arithmetic of LayerNorm and RMSNorm on contiguous rows: RMSNorm is LayerNorm with a mean of zero.
//
// Included once for each instruction set, in a namespace of its own, with MEGAHP_VECTOR_BYTES the width of its
// registers: hence no include guard. No libtorch here: T is the type of the data (a tag for 16-bit floats, which
// are loaded by their bits), A that of statistics, weights and sums.

template <class A>
struct Vector {
  static constexpr int lanes = MEGAHP_VECTOR_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(MEGAHP_VECTOR_BYTES)));
};
typedef uint32_t Bits32 __attribute__((vector_size(MEGAHP_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(MEGAHP_VECTOR_BYTES / 2)));
typedef Vector<float>::type Floats;

// Conversions by hand: of __builtin_convertvector GCC 12 makes five instructions where one would do.
#if MEGAHP_VECTOR_BYTES == 64
MEGAHP_INLINE Bits32 long_bits(Bits16 bits) {
  return reinterpret_cast<Bits32>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(bits)));
}
MEGAHP_INLINE Bits16 short_bits(Bits32 bits) {
  return reinterpret_cast<Bits16>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
}
MEGAHP_INLINE Floats widen(Bits16 bits, Half) {
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
}
MEGAHP_INLINE Bits16 narrow(Floats value, Half) {
  return reinterpret_cast<Bits16>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif MEGAHP_VECTOR_BYTES == 32
MEGAHP_INLINE Bits32 long_bits(Bits16 bits) {
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
}
MEGAHP_INLINE Bits16 short_bits(Bits32 bits) {
  const __m256i all = reinterpret_cast<__m256i>(bits);
  return reinterpret_cast<Bits16>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
MEGAHP_INLINE Floats widen(Bits16 bits, Half) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
}
MEGAHP_INLINE Bits16 narrow(Floats value, Half) {
  return reinterpret_cast<Bits16>(_mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
MEGAHP_INLINE Bits32 long_bits(Bits16 bits) { return __builtin_convertvector(bits, Bits32); }
MEGAHP_INLINE Bits16 short_bits(Bits32 bits) { return __builtin_convertvector(bits, Bits16); }
MEGAHP_INLINE Floats widen(Bits16 bits, Half) {
  Floats value;
  for (int i = 0; i < Vector<float>::lanes; ++i) value[i] = Half(bits[i], Half::from_bits());
  return value;
}
MEGAHP_INLINE Bits16 narrow(Floats value, Half) {
  Bits16 bits;
  for (int i = 0; i < Vector<float>::lanes; ++i) bits[i] = Half(value[i]).x;
  return bits;
}
#endif

MEGAHP_INLINE Floats widen(Bits16 bits, BFloat16) { return reinterpret_cast<Floats>(long_bits(bits) << 16); }

// To the nearest, ties to even; NaN stays NaN.
MEGAHP_INLINE Bits16 narrow(Floats value, BFloat16) {
  const Bits32 bits = reinterpret_cast<Bits32>(value);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return short_bits(value == value ? rounded : Bits32{} + 0x7fc0);
}

// A vector from memory, widened, and back. `count` says how many elements there are: the others are 0 and not touched.
template <class A, class T, class Count>
MEGAHP_INLINE typename Vector<A>::type load(const T* from, Count count) {
  if constexpr (sizeof(T) == 2) {
    Bits16 bits{};
    std::memcpy(&bits, from, count * sizeof(T));
    return widen(bits, T{});
  } else {
    typename Vector<A>::type value{};
    std::memcpy(&value, from, count * sizeof(T));
    return value;
  }
}

template <class T, class V, class Count>
MEGAHP_INLINE void store(T* to, V value, Count count) {
  if constexpr (sizeof(T) == 2) {
    const Bits16 bits = narrow(value, T{});
    std::memcpy(to, &bits, count * sizeof(T));
  } else {
    std::memcpy(to, &value, count * sizeof(T));
  }
}

// Asks for memory ahead of its use, which may be past the end: the next row while this one is finished, and what will
// be written while this row is still being read. Without it the backward of 4,096 fp32 columns takes 1.25 times as
// long.
MEGAHP_INLINE void fetch(const void* address) { __builtin_prefetch(address, 0, 2); }
MEGAHP_INLINE void fetch_for_writing(const void* address) { __builtin_prefetch(address, 1); }

// Calls body(offset, count, k) for each vector of a row. count is a constant but for what remains at the end. k says
// which of kSums sums the vector belongs to: with several no addition waits for the last one.
template <class A, class Body>
MEGAHP_INLINE void for_each_vector(int64_t width, const Body& body) {
  constexpr std::integral_constant<int64_t, Vector<A>::lanes> whole;
  int64_t i = 0;
  for (; i + kSums * whole <= width; i += kSums * whole) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) body(i + k * whole, whole, k);
  }
  for (; i + whole <= width; i += whole) body(i, whole, 0);
  if (i < width) body(i, width - i, 0);
}

template <class V, int... i>
MEGAHP_INLINE auto folded(V value, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(value, value, i...) +
         __builtin_shufflevector(value, value, (i + static_cast<int>(sizeof...(i)))...);
}

// The sum of all lanes: half is added to half until two are left.
template <class A, class V>
MEGAHP_INLINE A total(V value) {
  constexpr int lanes = sizeof(V) / sizeof(A);
  if constexpr (lanes == 2)
    return value[0] + value[1];
  else
    return total<A>(folded(value, std::make_integer_sequence<int, lanes / 2>{}));
}

template <class A, class V>
MEGAHP_INLINE A total(const V (&sums)[kSums]) {
  return total<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = (s - mean) rstd weight + bias for `rows` rows of `width`, where s is x, or if `added` the stream, which is
// x + alpha branch, rounded.
template <bool centered, bool added, class T, class A>
void normalize_rows(int64_t rows, int64_t width, A alpha, A eps, const T* x, const T* branch, const A* weight,
                    const A* bias, T* stream, T* y, A* mean, A* rstd) {
  using V = typename Vector<A>::type;
  for (int64_t row = 0; row < rows; ++row, x += width, branch += width, stream += width, y += width) {
    if constexpr (added) {
      for_each_vector<A>(width, [&](int64_t i, auto count, int) MEGAHP_LAMBDA {
        store(stream + i, load<A>(x + i, count) + alpha * load<A>(branch + i, count), count);
      });
    }
    const T* s = added ? stream : x;
    A center = 0;
    if constexpr (centered) {
      V sums[kSums] = {};
      for_each_vector<A>(width, [&](int64_t i, auto count, int k) MEGAHP_LAMBDA { sums[k] += load<A>(s + i, count); });
      mean[row] = center = total<A>(sums) / width;
    }
    V squares[kSums] = {};
    for_each_vector<A>(width, [&](int64_t i, auto count, int k) MEGAHP_LAMBDA {
      fetch_for_writing(y + i);
      V deviation = load<A>(s + i, count) - center;
      // Lanes beyond the row do not deviate from the mean.
      if constexpr (!std::is_empty_v<decltype(count)>)
        deviation = load<A>(reinterpret_cast<const A*>(&deviation), count);
      squares[k] += deviation * deviation;
    });
    const A scale = rstd[row] = 1 / std::sqrt(total<A>(squares) / width + eps);
    for_each_vector<A>(width, [&](int64_t i, auto count, int) MEGAHP_LAMBDA {
      fetch(x + width + i);
      if constexpr (added) {
        fetch(branch + width + i);
        fetch_for_writing(stream + width + i);
      }
      V value = (load<A>(s + i, count) - center) * scale * load<A>(weight + i, count);
      if constexpr (centered) value += load<A>(bias + i, count);
      store(y + i, value, count);
    });
  }
}

// With n = (x - mean) rstd and g = dy weight, in each row
//     dx = (g - average(g) - n average(g n)) rstd + dstream      (RMSNorm: without average(g)),
// and over the rows dweight = sum(dy n), dbias = sum(dy), which are written, not added to. dstream counts if
// `streamed`.
template <bool centered, bool streamed, class T, class A>
void differentiate_rows(int64_t rows, int64_t width, const T* dy, const T* dstream, const T* x, const A* weight,
                        const A* mean, const A* rstd, T* dx, A* dweight, A* dbias) {
  using V = typename Vector<A>::type;
  std::memset(dweight, 0, width * sizeof(A));
  if constexpr (centered) std::memset(dbias, 0, width * sizeof(A));

  for (int64_t row = 0; row < rows; ++row, dy += width, x += width, dx += width) {
    const A center = centered ? mean[row] : 0, scale = rstd[row];
    V sums[kSums] = {}, projections[kSums] = {};
    for_each_vector<A>(width, [&](int64_t i, auto count, int k) MEGAHP_LAMBDA {
      const V w = load<A>(weight + i, count);
      fetch_for_writing(dx + i);
      const V d = load<A>(dy + i, count);
      const V product = d * ((load<A>(x + i, count) - center) * scale);
      store(dweight + i, load<A>(dweight + i, count) + product, count);
      projections[k] += product * w;
      if constexpr (centered) {
        store(dbias + i, load<A>(dbias + i, count) + d, count);
        sums[k] += d * w;
      }
    });
    const A projection = total<A>(projections) / width, sum = centered ? total<A>(sums) / width : 0;
    for_each_vector<A>(width, [&](int64_t i, auto count, int) MEGAHP_LAMBDA {
      fetch(x + width + i);
      fetch(dy + width + i);
      const V normal = (load<A>(x + i, count) - center) * scale;
      V g = load<A>(dy + i, count) * load<A>(weight + i, count) - normal * projection;
      if constexpr (centered) g -= sum;
      g *= scale;
      if constexpr (streamed) g += load<A>(dstream + i, count);
      store(dx + i, g, count);
    });
    if constexpr (streamed) dstream += width;
  }
}

// Of `partial` [examples, parts, width], columns `begin` to `end`: sums over the parts are the gradients of the
// examples. They are written to dweight [examples, width] if by_example, else their sum to dweight [width]. Returns
// the sum of their squares.
template <class A>
A sum_examples(int64_t examples, int64_t parts, int64_t width, int64_t begin, int64_t end, bool by_example,
               const A* partial, A* dweight) {
  using V = typename Vector<A>::type;
  V squares{};
  for_each_vector<A>(end - begin, [&](int64_t i, auto count, int) MEGAHP_LAMBDA {
    const int64_t column = begin + i;
    V sum{};
    for (int64_t example = 0; example < examples; ++example) {
      V gradient{};
      for (int64_t part = 0; part < parts; ++part)
        gradient += load<A>(partial + (example * parts + part) * width + column, count);
      squares += gradient * gradient;
      sum += gradient;
      if (by_example) store(dweight + example * width + column, gradient, count);
    }
    if (!by_example) store(dweight + column, sum, count);
  });
  return total<A>(squares);
}
