// The norm ops on CUDA: binding, launch shapes, workspace. Their schemas are in megahp/ops/norm.py.
#include <algorithm>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "norm.h"
#include "norm_kernels.cuh"

// Torch's headers declare it only under USE_CUDA; declared here, this file compiles against a CPU build's headers too.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace megahp {
namespace {

using torch::stable::contiguous;
using torch::stable::new_empty;
using torch::stable::new_zeros;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, or the next call that checks would report it
  STD_TORCH_CHECK(false, "norm: CUDA says: ", cudaGetErrorString(error));
}

// Makes a tensor's device current for its own lifetime, and holds the current stream of that device.
struct Device {
  explicit Device(const Tensor& x) : guard(x.get_device_index()), index(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index));
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard;
  int32_t index;
  cudaStream_t stream;
};

template <class P>
struct Launch {
  void (*kernel)(P);
  dim3 block;
  size_t shared;  // dynamic shared memory in bytes

  // More than 48 KiB of shared memory must be requested explicitly.
  void allow_shared() const {
    if (shared > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }

  void operator()(const Device& device, dim3 grid, const P& parameters) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = device.stream;
    check(cudaLaunchKernelEx(&config, kernel, parameters));
  }
};

// Threads for a row of this many vectors, and the rows side by side that make a block of about 256 threads.
dim3 block_of(int64_t vectors, int64_t of_a_thread) {
  const int64_t needed = divided_up(vectors, of_a_thread);
  unsigned x = 1;
  while (x < 32 && x < needed) x *= 2;
  if (needed > 32) x = static_cast<unsigned>(divided_up(needed, 32) * 32);
  return dim3(x, std::max(1u, 256 / x));
}

dim3 block_of_wide_row(int64_t vectors) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(kMostThreads, divided_up(vectors, 32) * 32)));
}

// One vector of a thread for rows that a warp can share, else sixteen elements.
template <bool centered, class T, class A>
Launch<Forward<T, A>> forward_launch(const Forward<T, A>& p) {
  const int64_t vectors = divided_up(p.width, kPerVector<T>);
  if constexpr (sizeof(T) < 8) {
    constexpr int many = 16 / kPerVector<T>;
    if (p.whole && vectors <= 32) return {normalize_rows<centered, T, A, 1>, block_of(vectors, 1), 0};
    if (p.whole && vectors <= many * kMostThreads)
      return {normalize_rows<centered, T, A, many>, block_of(vectors, many), 0};
  }
  return {normalize_wide_row<centered, T, A>, block_of_wide_row(vectors), 0};
}

// Eight elements in a thread, or sixteen where RMSNorm's block would be too large: the sums of each take registers.
template <bool centered, class T, class A>
Launch<Backward<T, A>> backward_launch(Backward<T, A>& p, size_t most_shared) {
  const int64_t vectors = divided_up(p.width, kPerVector<T>);
  if constexpr (sizeof(T) < 8) {
    constexpr int some = 8 / kPerVector<T>, more = sizeof(T) == 2 && !centered ? 2 * some : some;
    const int of_a_thread = vectors <= some * kMostThreads ? some : more;
    const dim3 block = block_of(vectors, of_a_thread);
    const size_t of_an_element = kStages * (p.dstream ? 3 : 2) * sizeof(T) + sizeof(A);  // rows, weight
    const size_t shared = of_an_element * kPerVector<T> * of_a_thread * block.x * block.y;
    if (block.x <= kMostThreads && shared <= most_shared && p.whole)
      return {of_a_thread == some ? differentiate_rows<centered, T, A, some> : differentiate_rows<centered, T, A, more>,
              block, shared};
  }
  const size_t sums = divided_up(p.width, 4) * 4 * sizeof(A) * (p.dbias ? 2 : 1);
  p.in_shared = sums <= most_shared;
  return {differentiate_wide_rows<centered, T, A>, block_of_wide_row(vectors), p.in_shared ? sums : 0};
}

// Blocks for each example such that, of `places` for blocks on the device, few stay empty in the last wave. One wave is
// best, for each block costs a part of the workspace.
int64_t blocks_of_example(int64_t examples, int64_t places, int64_t most) {
  int64_t best = 1;
  double best_share = 0;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t blocks = std::clamp<int64_t>(waves * places / examples, 1, most);
    const int64_t total = blocks * examples;
    const double share = static_cast<double>(total) / static_cast<double>(divided_up(total, places) * places);
    if (share > best_share + 0.05) best = blocks, best_share = share;
  }
  return best;
}

template <class P>
int64_t places_of(const Launch<P>& launch, const Device& device) {
  const int threads = static_cast<int>(launch.block.x * launch.block.y);
  int blocks = 0;  // at a time on a multiprocessor; more than make 1,024 threads only add parts
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, launch.kernel, threads, launch.shared));
  blocks = std::clamp(blocks, 1, std::max(2, kMostThreads / threads));
  return static_cast<int64_t>(blocks) * device.attribute(cudaDevAttrMultiProcessorCount);
}

// Whether every row is made of whole 16-byte vectors. Pointers that are null are.
template <class T, class... P>
bool is_whole(int64_t width, const P*... pointers) {
  return width % kPerVector<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A weight or bias that the kernels can read: of x's type or the accumulation type.
Tensor readable(const Tensor& parameter, const Tensor& x) {
  const auto dtype = parameter.scalar_type();
  if (dtype == x.scalar_type() || dtype == accumulate_type(x)) return contiguous(parameter);
  return contiguous(torch::stable::to(parameter, accumulate_type(x)));
}

template <class T, class A>
Parameter<T, A> parameter_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.element_size() == sizeof(T)};
}

void check_device(const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.device() == x.device(), "norm: all tensors must be on the device of x");
}

// Other tensors are passed in place of a missing input; the kernels get null for it.

// `probe` and `group` matter to the backward alone; norm_cpu.cpp says why `group` is a handle.
std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& input, const Optional& added, double alpha, const Tensor& weight,
                                        const Optional& bias, const Optional&, bool centered, double eps,
                                        StringHandle group) {
  torch_delete_string(group);
  check_forward(input, added, weight, bias, centered);
  check_device(weight, input);
  if (bias) check_device(*bias, input);
  if (added) check_device(*added, input);
  const NormShape shape = norm_shape(input);
  const Device device(input);
  const Tensor x = contiguous(input), w = readable(weight, input);
  const Tensor b = bias ? readable(*bias, input) : w, branch = added ? contiguous(*added) : x;
  const Tensor y = new_empty(x, x.sizes());
  const Tensor stream = added ? new_empty(x, x.sizes()) : new_empty(x, {0});
  const Tensor statistics = new_empty(x, statistics_sizes(x, centered), accumulate_type(x));

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    Forward<T, A> p{};
    p.x = data<T>(x);
    if (added) p.branch = data<T>(branch), p.stream = mutable_data<T>(stream);
    p.alpha = static_cast<A>(alpha);
    p.weight = parameter_of<T, A>(w);
    if (bias) p.bias = parameter_of<T, A>(b);
    p.y = mutable_data<T>(y);
    p.eps = static_cast<A>(eps);
    p.rows = shape.examples * shape.rows;
    p.mean = mutable_data<A>(statistics);
    p.rstd = centered ? p.mean + p.rows : p.mean;
    p.width = static_cast<int>(shape.width);
    p.whole = is_whole<T>(p.width, p.x, p.branch, p.stream, p.y, static_cast<const char*>(p.weight.data),
                          static_cast<const char*>(p.bias.data));
    if (p.rows == 0) return;
    const auto launch = centered ? forward_launch<true>(p) : forward_launch<false>(p);
    launch(device, dim3(static_cast<unsigned>(divided_up(p.rows, launch.block.y))), p);
  });
  return {stream, y, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& gradient, const Optional& gradient_of_stream,
                                                         const Tensor& input, const Tensor& weight,
                                                         const Tensor& statistics, bool centered, bool by_example,
                                                         bool bias) {
  check_backward(gradient, gradient_of_stream, input, weight, statistics, centered, bias);
  for (const Tensor& tensor : {gradient, weight, statistics}) check_device(tensor, input);
  if (gradient_of_stream) check_device(*gradient_of_stream, input);
  const NormShape shape = norm_shape(input);
  const Device device(input);
  const Tensor dy = contiguous(gradient), x = contiguous(input), w = readable(weight, input);
  const Tensor s = contiguous(statistics), dstream = gradient_of_stream ? contiguous(*gradient_of_stream) : dy;

  std::vector<int64_t> sizes{shape.width}, no_sizes{};
  if (by_example) sizes.insert(sizes.begin(), shape.examples);
  const Tensor dx = new_empty(x, x.sizes());
  if (shape.examples * shape.rows == 0) {
    const Tensor dweight = new_zeros(s, sizes);
    return {dx, dweight, bias ? new_zeros(s, sizes) : new_empty(s, {0}), new_zeros(s, no_sizes)};
  }
  const Tensor dweight = new_empty(s, sizes), dbias = bias ? new_empty(s, sizes) : new_empty(s, {0});
  const Tensor squares = new_empty(s, no_sizes);

  dispatch(x, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    Backward<T, A> p{};
    p.dbias = bias ? mutable_data<A>(dbias) : nullptr;  // the launch depends on whether there is one
    p.dy = data<T>(dy);
    if (gradient_of_stream) p.dstream = data<T>(dstream);
    p.x = data<T>(x);
    p.weight = parameter_of<T, A>(w);
    p.mean = data<A>(s);
    p.rstd = centered ? p.mean + shape.examples * shape.rows : p.mean;
    p.dx = mutable_data<T>(dx);
    p.rows = shape.rows;
    p.width = static_cast<int>(shape.width);
    p.whole = is_whole<T>(p.width, p.dy, p.dstream, p.x, p.dx, static_cast<const char*>(p.weight.data));
    const auto shared = static_cast<size_t>(device.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - kStaticShared;
    const auto launch = centered ? backward_launch<true>(p, shared) : backward_launch<false>(p, shared);
    launch.allow_shared();
    p.blocks = static_cast<int>(blocks_of_example(shape.examples, places_of(launch, device),
                                                  divided_up(shape.rows, launch.block.y)));

    const int64_t part = shape.examples * p.blocks * shape.width;
    const dim3 tiles(static_cast<unsigned>(divided_up(shape.width, 32)), bias ? 2 : 1);
    const Tensor workspace = new_empty(s, {part * tiles.y + tiles.x * tiles.y + 1});
    Reduction<A> q{};
    q.parts = p.dweight = mutable_data<A>(workspace);
    if (bias) p.dbias = p.dweight + part;
    q.tile_squares = p.dweight + part * tiles.y;
    q.finished = p.finished = reinterpret_cast<unsigned*>(q.tile_squares + tiles.x * tiles.y);
    q.dweight = mutable_data<A>(dweight);
    q.dbias = mutable_data<A>(dbias);
    q.squares = mutable_data<A>(squares);
    q.examples = shape.examples;
    q.blocks = p.blocks;
    q.width = p.width;
    q.by_example = by_example;
    launch(device, dim3(static_cast<unsigned>(shape.examples * p.blocks)), p);
    Launch<Reduction<A>>{reduce_parts<A>, dim3(32, 32), 0}(device, tiles, q);
  });
  return {dx, dweight, dbias, squares};
}

}  // namespace
}  // namespace megahp

STABLE_TORCH_LIBRARY_IMPL(megahp, CUDA, m) {
  m.impl("norm", TORCH_BOX(&megahp::norm));
  m.impl("norm_backward", TORCH_BOX(&megahp::norm_backward));
}
