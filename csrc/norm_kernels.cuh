// The norms' device code: LayerNorm, and RMSNorm as LayerNorm with a mean of zero; of libtorch only its 16-bit floats.
//
// T is the type of the data, A that of statistics and sums. In a block, threadIdx.y is one of the rows it works on side
// by side and threadIdx.x a thread of that row: at most 32, a power of two, or a multiple of 32. A thread moves whole
// vectors of 16 bytes, its k-th at column (k blockDim.x + threadIdx.x) elements of a vector. Every sum is taken in an
// order that launch shape and sizes fix, so that the same inputs give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace megahp {

constexpr int kMostThreads = 1024;  // in a block

// Bytes of shared memory, at most, that the backward kernels take beside what their launch gives them.
constexpr int kStaticShared = 2 * 2 * 32 * sizeof(double);


template <class T>
constexpr int kPerVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T values[kPerVector<T>];
};

// Elements first, first + 1, ... of a row of `width`; zeros past its end. `whole` says that every vector of every row
// is aligned and ends within it; else, as with odd widths, the elements are moved one by one.
template <class T>
__device__ __forceinline__ Vector<T> load(const T* row, int first, int width, bool whole) {
  if (whole) return first < width ? *reinterpret_cast<const Vector<T>*>(row + first) : Vector<T>{};
  Vector<T> vector{};
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j)
    if (first + j < width) vector.values[j] = row[first + j];
  return vector;
}

template <class T>
__device__ __forceinline__ void store(T* row, int first, int width, bool whole, const Vector<T>& vector) {
  if (whole) {
    if (first < width) *reinterpret_cast<Vector<T>*>(row + first) = vector;
    return;
  }
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j)
    if (first + j < width) row[first + j] = vector.values[j];
}

template <class T>
struct Pair;

template <>
struct Pair<torch::headeronly::BFloat16> {
  __nv_bfloat162 value;
  __device__ __forceinline__ float2 floats() const { return __bfloat1622float2(value); }
  __device__ __forceinline__ static Pair of(float a, float b) { return {__floats2bfloat162_rn(a, b)}; }
};

template <>
struct Pair<torch::headeronly::Half> {
  __half2 value;
  __device__ __forceinline__ float2 floats() const { return __half22float2(value); }
  __device__ __forceinline__ static Pair of(float a, float b) { return {__floats2half2_rn(a, b)}; }
};

// The values of a vector in type A. 16-bit floats are converted two at a time and stay packed, two to a register.
template <class A, class T>
__device__ __forceinline__ void unpack(A (&values)[kPerVector<T>], const Vector<T>& vector) {
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    if constexpr (sizeof(T) == 2) {
      Pair<T> pair;
      memcpy(&pair, vector.values + j, sizeof pair);
      const float2 two = pair.floats();
      values[j] = two.x;
      values[++j] = two.y;
    } else {
      values[j] = vector.values[j];
    }
  }
}

template <class T, class A>
__device__ __forceinline__ Vector<T> pack(const A (&values)[kPerVector<T>]) {
  Vector<T> vector;
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    if constexpr (sizeof(T) == 2) {
      const auto pair = Pair<T>::of(values[j], values[j + 1]);
      memcpy(vector.values + j++, &pair, sizeof pair);
    } else {
      vector.values[j] = values[j];
    }
  }
  return vector;
}

// As load, but from device to shared memory without waiting: the thread that asked may read `slot` after its wait.
template <class T>
__device__ __forceinline__ void load_ahead(Vector<T>* slot, const T* row, int first, int width, bool whole) {
  if (whole && first < width)
    __pipeline_memcpy_async(slot, row + first, sizeof(Vector<T>));
  else
    *slot = load(row, first, width, whole);
}

// A weight or bias, [width], of type T (`narrow`) or A; zeros where there is none.
template <class T, class A>
struct Parameter {
  const void* data;
  bool narrow;

  __device__ __forceinline__ void load(A (&values)[kPerVector<T>], int first, int width, bool whole) const {
    if (!data) width = 0;
    if (narrow) {
      unpack(values, megahp::load(static_cast<const T*>(data), first, width, whole));
    } else {
#pragma unroll
      for (int j = 0; j < kPerVector<T>; j += kPerVector<A>) {
        const Vector<A> vector = megahp::load(static_cast<const A*>(data), first + j, width, whole);
#pragma unroll
        for (int k = 0; k < kPerVector<A>; ++k) values[j + k] = vector.values[k];
      }
    }
  }
};

// Sums of `count` quantities over the threads of a row: each thread gets the same bits. `slots` are shared memory that
// no thread may still be reading; only rows wider than a warp use them, and meet at a barrier.
template <int count, class A>
__device__ __forceinline__ void sum_over_row(A (&values)[count], A (&slots)[count][32]) {
  const int lanes = blockDim.x < 32 ? blockDim.x : 32;
#pragma unroll
  for (int i = 0; i < count; ++i)
    for (int offset = lanes / 2; offset > 0; offset /= 2) values[i] += __shfl_xor_sync(~0u, values[i], offset);
  if (blockDim.x <= 32) return;

  const int warps = blockDim.x / 32, lane = threadIdx.x % 32, first = threadIdx.y * warps;
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < count; ++i) slots[i][first + threadIdx.x / 32] = values[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = lane < warps ? slots[i][first + lane] : A(0);
    for (int offset = 16; offset > 0; offset /= 2) values[i] += __shfl_xor_sync(~0u, values[i], offset);
  }
}

template <class T, class A>
__device__ __forceinline__ void add_branch(Vector<T>& x, const Vector<T>& branch, A alpha) {
  A sum[kPerVector<T>], term[kPerVector<T>];
  unpack(sum, x);
  unpack(term, branch);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) sum[j] += alpha * term[j];
  x = pack<T>(sum);
}

// Forward: stream = x + alpha branch where there is a branch, else x; y = (stream - mean) rstd weight + bias.

template <class T, class A>
struct Forward {
  const T *x, *branch;  // [rows, width]; branch may be null
  A alpha;
  Parameter<T, A> weight, bias;
  T *stream, *y;  // stream is written where there is a branch
  A *mean, *rstd;
  A eps;
  int64_t rows;
  int width;
  bool whole;
};

template <bool centered, class T, class A>
__device__ __forceinline__ Vector<T> normalized(const Forward<T, A>& p, const Vector<T>& x, A mean, A rstd, int first,
                                                bool whole) {
  A weight[kPerVector<T>], bias[kPerVector<T>];
  p.weight.load(weight, first, p.width, whole);
  if constexpr (centered) p.bias.load(bias, first, p.width, whole);
  A values[kPerVector<T>];
  unpack(values, x);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    values[j] = (values[j] - mean) * rstd * weight[j];
    if constexpr (centered) values[j] += bias[j];
  }
  return pack<T>(values);
}

// The sum over a vector of x, and of (x - mean)^2, leaving out what is past the row's end.
template <class A, class T>
__device__ __forceinline__ A sum(const Vector<T>& x) {
  A values[kPerVector<T>], total = 0;
  unpack(values, x);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) total += values[j];
  return total;
}

template <class A, class T>
__device__ __forceinline__ A sum_of_squares(const Vector<T>& x, A mean, int first, int width, bool whole) {
  if (first >= width) return 0;
  A values[kPerVector<T>], total = 0;
  unpack(values, x);
#pragma unroll
  for (int j = 0; j < kPerVector<T>; ++j) {
    const A deviation = whole || first + j < width ? values[j] - mean : A(0);
    total += deviation * deviation;
  }
  return total;
}

// The row stays in registers, `vectors` of 16 bytes in each thread.
template <bool centered, class T, class A, int vectors>
__global__ void __launch_bounds__(kMostThreads, 1) normalize_rows(const Forward<T, A> p) {
  __shared__ A slots[2][1][32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int width = row < p.rows ? p.width : 0;  // the last block may have rows too many: they are empty
  const int64_t at = row * p.width;
  const auto column = [](int v) { return static_cast<int>(v * blockDim.x + threadIdx.x) * kPerVector<T>; };

  Vector<T> x[vectors];
#pragma unroll
  for (int v = 0; v < vectors; ++v) x[v] = load(p.x + at, column(v), width, true);
  if (p.branch) {
    Vector<T> branch[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) branch[v] = load(p.branch + at, column(v), width, true);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      add_branch(x[v], branch[v], p.alpha);
      store(p.stream + at, column(v), width, true, x[v]);
    }
  }

  A mean[1] = {0}, squares[1] = {0};
  if constexpr (centered) {
#pragma unroll
    for (int v = 0; v < vectors; ++v) mean[0] += sum<A>(x[v]);
    sum_over_row(mean, slots[0]);
    mean[0] /= p.width;
  }
#pragma unroll
  for (int v = 0; v < vectors; ++v) squares[0] += sum_of_squares(x[v], mean[0], column(v), width, true);
  sum_over_row(squares, slots[1]);
  const A rstd = A(1) / sqrt(squares[0] / p.width + p.eps);

#pragma unroll
  for (int v = 0; v < vectors; ++v)
    store(p.y + at, column(v), width, true, normalized<centered>(p, x[v], mean[0], rstd, column(v), true));
  if (threadIdx.x == 0 && width > 0) {
    if constexpr (centered) p.mean[row] = mean[0];
    p.rstd[row] = rstd;
  }
}

// A row too wide for registers: one block, which reads it again from L2 for each pass.
template <bool centered, class T, class A>
__global__ void __launch_bounds__(kMostThreads, 1) normalize_wide_row(const Forward<T, A> p) {
  __shared__ A slots[2][1][32];
  const int64_t row = blockIdx.x, at = row * p.width;
  const int begin = threadIdx.x * kPerVector<T>, step = blockDim.x * kPerVector<T>;
  const T* const stream = p.branch ? p.stream + at : p.x + at;

  if (p.branch)
    for (int i = begin; i < p.width; i += step) {
      Vector<T> x = load(p.x + at, i, p.width, p.whole);
      add_branch(x, load(p.branch + at, i, p.width, p.whole), p.alpha);
      store(p.stream + at, i, p.width, p.whole, x);
    }

  A mean[1] = {0}, squares[1] = {0};
  if constexpr (centered) {
    for (int i = begin; i < p.width; i += step) mean[0] += sum<A>(load(stream, i, p.width, p.whole));
    sum_over_row(mean, slots[0]);
    mean[0] /= p.width;
  }
  for (int i = begin; i < p.width; i += step)
    squares[0] += sum_of_squares(load(stream, i, p.width, p.whole), mean[0], i, p.width, p.whole);
  sum_over_row(squares, slots[1]);
  const A rstd = A(1) / sqrt(squares[0] / p.width + p.eps);

  for (int i = begin; i < p.width; i += step)
    store(p.y + at, i, p.width, p.whole,
          normalized<centered>(p, load(stream, i, p.width, p.whole), mean[0], rstd, i, p.whole));
  if (threadIdx.x == 0) {
    if constexpr (centered) p.mean[row] = mean[0];
    p.rstd[row] = rstd;
  }
}

// Backward. With n = (x - mean) rstd and g = dy weight, in each row
//     dx = (g - average(g) - n average(g n)) rstd + dstream      (RMSNorm: without average(g)),
// and over the rows of an example dweight = sum(dy n), dbias = sum(dy). Each block takes a run of rows of one example
// and leaves its own part of these sums, which reduce_parts adds up.

template <class T, class A>
struct Backward {
  const T *dy, *dstream, *x;  // [examples, rows, width]; dstream may be null
  Parameter<T, A> weight;
  const A *mean, *rstd;  // [examples, rows]; RMSNorm has no mean
  T* dx;
  A *dweight, *dbias;  // [examples, blocks, width]; dbias may be null
  unsigned* finished;  // reduce_parts' count, set to zero here
  int64_t rows;        // of an example
  int blocks;          // of an example
  int width;
  bool whole;
  bool in_shared;  // differentiate_wide_rows: shared memory holds the block's sums
};

struct Run {
  int64_t example, begin, end;  // rows begin to end - 1 of all, counted over the examples
};

template <class T, class A>
__device__ __forceinline__ Run run_of_block(const Backward<T, A>& p) {
  const int64_t example = blockIdx.x / p.blocks, block = blockIdx.x % p.blocks, start = example * p.rows;
  return {example, start + p.rows * block / p.blocks, start + p.rows * (block + 1) / p.blocks};
}

template <class A>
struct Row {
  A mean, rstd;
};

template <bool centered, class T, class A>
__device__ __forceinline__ Row<A> statistics(const Backward<T, A>& p, int64_t row, int64_t end) {
  if (row >= end) return {0, 0};
  return {centered ? p.mean[row] : A(0), p.rstd[row]};
}

// A vector's dy, its n = (x - mean) rstd, and the weight.
template <class T, class A>
struct Terms {
  A dy[kPerVector<T>], normal[kPerVector<T>], weight[kPerVector<T>];

  __device__ __forceinline__ Terms(const Vector<T>& gradient, const Vector<T>& x, const Row<A>& row) {
    unpack(dy, gradient);
    unpack(normal, x);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) normal[j] = (normal[j] - row.mean) * row.rstd;
  }

  // Adds to { sum(g n), sum(g) }.
  template <int count>
  __device__ __forceinline__ void project(A (&sums)[count]) const {
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) {
      sums[0] += dy[j] * weight[j] * normal[j];
      if constexpr (count > 1) sums[1] += dy[j] * weight[j];
    }
  }

  template <int count>
  __device__ __forceinline__ Vector<T> dx(const A (&averages)[count], const Row<A>& row,
                                          const Vector<T>& dstream) const {
    A values[kPerVector<T>];
    unpack(values, dstream);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) {
      A value = dy[j] * weight[j] - normal[j] * averages[0];
      if constexpr (count > 1) value -= averages[1];
      values[j] += value * row.rstd;
    }
    return pack<T>(values);
  }
};

// out[column] = the sum over threadIdx.y of `sums`, through shared memory that no thread uses otherwise.
template <class T, class A, int elements>
__device__ __forceinline__ void write_part(A* out, const A (&sums)[elements], A* shared, int width) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, padded = blockDim.x * elements;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < elements; ++i) {
    const int vector = i / kPerVector<T> * blockDim.x + threadIdx.x;
    shared[threadIdx.y * padded + vector * kPerVector<T> + i % kPerVector<T>] = sums[i];
  }
  __syncthreads();
  for (int column = thread; column < width; column += blockDim.x * blockDim.y) {
    A total = 0;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) total += shared[y * padded + column];
    out[column] = total;
  }
}

extern __shared__ uint4 shared_memory[];

// How many rows ahead of its work a thread asks for its part of dy, x and dstream, plus one; each has its slots.
constexpr int kStages = 2;

// The rows pass through shared memory, of which a thread reads only what it wrote; the sums stay in registers.
template <bool centered, class T, class A, int vectors>
__global__ void __launch_bounds__(kMostThreads, 1) differentiate_rows(const Backward<T, A> p) {
  __shared__ A slots[2][1 + centered][32];
  constexpr int elements = vectors * kPerVector<T>;
  const Run run = run_of_block(p);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int arrays = p.dstream ? 3 : 2;
  const auto column = [](int v) { return static_cast<int>(v * blockDim.x + threadIdx.x) * kPerVector<T>; };
  const auto slot = [&](int step, int array, int v) {
    const int stage = step % kStages;
    return reinterpret_cast<Vector<T>*>(shared_memory) + ((stage * arrays + array) * vectors + v) * threads + thread;
  };
  const auto row_of = [&](int step) { return run.begin + static_cast<int64_t>(step) * blockDim.y + threadIdx.y; };
  const auto load_step = [&](int step) {
    const int64_t row = row_of(step), at = row * p.width;
    const int width = row < run.end ? p.width : 0;  // rows past the end are zeros and add nothing
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      load_ahead(slot(step, 0, v), p.dy + at, column(v), width, true);
      load_ahead(slot(step, 1, v), p.x + at, column(v), width, true);
      if (p.dstream) load_ahead(slot(step, 2, v), p.dstream + at, column(v), width, true);
    }
    __pipeline_commit();
  };

  Vector<A>* const weights = reinterpret_cast<Vector<A>*>(slot(0, kStages * arrays, 0));
  constexpr int pieces = kPerVector<T> / kPerVector<A>;
  const auto terms_of = [&](int step, int v, const Row<A>& row) {
    Terms<T, A> terms(*slot(step, 0, v), *slot(step, 1, v), row);
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      const Vector<A> weight = weights[(v * pieces + k) * threads];
#pragma unroll
      for (int j = 0; j < kPerVector<A>; ++j) terms.weight[k * kPerVector<A> + j] = weight.values[j];
    }
    return terms;
  };

  if (blockIdx.x == 0 && thread == 0) *p.finished = 0;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    A weight[kPerVector<T>];
    p.weight.load(weight, column(v), p.width, true);
#pragma unroll
    for (int k = 0; k < pieces; ++k) {
      Vector<A>& piece = weights[(v * pieces + k) * threads];
#pragma unroll
      for (int j = 0; j < kPerVector<A>; ++j) piece.values[j] = weight[k * kPerVector<A> + j];
    }
  }
  A dweight[elements] = {}, dbias[centered ? elements : 1] = {};
  for (int step = 0; step + 1 < kStages; ++step) load_step(step);
  Row<A> next = statistics<centered>(p, row_of(0), run.end);
  const int steps = static_cast<int>((run.end - run.begin + blockDim.y - 1) / blockDim.y);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    load_step(step + kStages - 1);
    const Row<A> row = next;
    next = statistics<centered>(p, row_of(step + 1), run.end);
    __pipeline_wait_prior(kStages - 1);

    A averages[1 + centered] = {};
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const Terms<T, A> terms = terms_of(step, v, row);
      terms.project(averages);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) {
        dweight[v * kPerVector<T> + j] += terms.dy[j] * terms.normal[j];
        if constexpr (centered) dbias[v * kPerVector<T> + j] += terms.dy[j];
      }
    }
    sum_over_row(averages, slots[step % 2]);
#pragma unroll
    for (int i = 0; i < 1 + centered; ++i) averages[i] /= p.width;

    const int width = row_of(step) < run.end ? p.width : 0;
#pragma unroll 1
    for (int v = 0; v < vectors; ++v) {
      const Terms<T, A> terms = terms_of(step, v, row);
      const Vector<T> dstream = p.dstream ? *slot(step, 2, v) : Vector<T>{};
      store(p.dx + row_of(step) * p.width, column(v), width, true, terms.dx(averages, row, dstream));
    }
  }

  __pipeline_wait_prior(0);
  A* const shared = reinterpret_cast<A*>(shared_memory);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * p.width;
  write_part<T>(p.dweight + part, dweight, shared, p.width);
  if constexpr (centered)
    if (p.dbias) write_part<T>(p.dbias + part, dbias, shared, p.width);
}

// sums += terms, or = for the first row.
template <class T, class A>
__device__ __forceinline__ void accumulate(A* sums, const A (&terms)[kPerVector<T>], bool is_first, int first,
                                           int width, bool whole) {
#pragma unroll
  for (int j = 0; j < kPerVector<T>; j += kPerVector<A>) {
    Vector<A> sum = load(sums, first + j, is_first ? 0 : width, whole);
#pragma unroll
    for (int k = 0; k < kPerVector<A>; ++k) sum.values[k] += terms[j + k];
    store(sums, first + j, width, whole, sum);
  }
}

// Rows too wide for that: read again from L2 for the second pass; the sums stay in shared memory where they fit, else
// in the block's part of the output, which L2 holds.
template <bool centered, class T, class A>
__global__ void __launch_bounds__(kMostThreads, 1) differentiate_wide_rows(const Backward<T, A> p) {
  __shared__ A slots[2][1 + centered][32];
  const Run run = run_of_block(p);
  const int begin = threadIdx.x * kPerVector<T>, step = blockDim.x * kPerVector<T>;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * p.width;
  A* const dweight = p.in_shared ? reinterpret_cast<A*>(shared_memory) : p.dweight + part;
  A* const dbias = p.in_shared ? dweight + (p.width + 3) / 4 * 4 : p.dbias + part;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.finished = 0;

  for (int64_t r = run.begin; r < run.end; ++r) {
    const int64_t at = r * p.width;
    const Row<A> row = statistics<centered>(p, r, run.end);
    const auto terms_of = [&](int i) {
      Terms<T, A> terms(load(p.dy + at, i, p.width, p.whole), load(p.x + at, i, p.width, p.whole), row);
      p.weight.load(terms.weight, i, p.width, p.whole);
      return terms;
    };
    A averages[1 + centered] = {};
    for (int i = begin; i < p.width; i += step) terms_of(i).project(averages);
    sum_over_row(averages, slots[r % 2]);
#pragma unroll
    for (int i = 0; i < 1 + centered; ++i) averages[i] /= p.width;

    for (int i = begin; i < p.width; i += step) {
      Terms<T, A> terms = terms_of(i);
      const Vector<T> dstream = p.dstream ? load(p.dstream + at, i, p.width, p.whole) : Vector<T>{};
      store(p.dx + at, i, p.width, p.whole, terms.dx(averages, row, dstream));
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) terms.normal[j] *= terms.dy[j];
      accumulate<T>(dweight, terms.normal, r == run.begin, i, p.width, p.whole);
      if (centered && p.dbias) accumulate<T>(dbias, terms.dy, r == run.begin, i, p.width, p.whole);
    }
  }

  if (!p.in_shared) return;
  __syncthreads();
  for (int i = threadIdx.x; i < p.width; i += blockDim.x) {
    p.dweight[part + i] = dweight[i];
    if (centered && p.dbias) p.dbias[part + i] = dbias[i];
  }
}

// The second stage: the parts of an example are added up, and either written (by_example) or squared and summed.

template <class A>
struct Reduction {
  const A* parts;  // [weight and bias, examples, blocks, width]
  A *dweight, *dbias;  // [width], or [examples, width] by_example
  A* squares;          // [1]
  A* tile_squares;     // [blocks of this launch]
  unsigned* finished;
  int64_t examples;
  int blocks, width;
  bool by_example;
};

// One block takes 32 columns, one warp at a time a slice of the parts of one example; blockIdx.y is 0 for the weight, 1
// for the bias. The last block to finish, whichever it is, sums the squares of all of them, in their order.
template <class A>
__global__ void __launch_bounds__(kMostThreads, 1) reduce_parts(const Reduction<A> p) {
  __shared__ A shared[32][33];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int column = blockIdx.x * 32 + lane;
  const int slices = p.examples < warps ? warps / static_cast<int>(p.examples) : 1;
  const int together = warps / slices;  // examples
  const A* const parts = p.parts + blockIdx.y * p.examples * p.blocks * p.width;
  A* const out = blockIdx.y == 0 ? p.dweight : p.dbias;

  A total = 0, squares = 0;
  for (int64_t first = 0; first < p.examples; first += together) {
    const int64_t example = first + warp / slices;
    const bool works = warp / slices < together && example < p.examples && column < p.width;
    A sum = 0;
    if (works)
#pragma unroll 4
      for (int block = warp % slices; block < p.blocks; block += slices)
        sum += parts[(example * p.blocks + block) * p.width + column];
    shared[warp][lane] = sum;
    __syncthreads();
    if (works && warp % slices == 0) {
      for (int slice = 1; slice < slices; ++slice) sum += shared[warp + slice][lane];
      if (p.by_example) {
        out[example * p.width + column] = sum;
      } else {
        total += sum;
        squares += sum * sum;
      }
    }
    __syncthreads();
  }

  const auto over_warps = [&](A value) {
    shared[warp][lane] = value;
    __syncthreads();
    A sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared[w][lane];
    __syncthreads();
    return sum;
  };
  const auto over_lanes = [](A value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
  };
  total = over_warps(total);
  squares = over_warps(squares);
  if (warp > 0) return;
  if (!p.by_example && column < p.width) out[column] = total;

  squares = over_lanes(squares);
  const int tiles = gridDim.x * gridDim.y;
  unsigned before = 0;
  if (lane == 0) {
    p.tile_squares[blockIdx.y * gridDim.x + blockIdx.x] = squares;
    __threadfence();
    before = atomicAdd(p.finished, 1u);
  }
  if (__shfl_sync(~0u, before, 0) != static_cast<unsigned>(tiles) - 1) return;
  __threadfence();
  squares = 0;
  for (int tile = lane; tile < tiles; tile += 32) squares += __ldcg(p.tile_squares + tile);
  squares = over_lanes(squares);
  if (lane == 0) *p.squares = squares;
}

}  // namespace megahp
