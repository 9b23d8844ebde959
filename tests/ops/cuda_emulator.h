// Enough of CUDA to run csrc/norm_cuda.cu on the CPU, for tests: the same source, compiled by g++ with this header in
// place of CUDA's, registers the ops for CPU tensors in a namespace of their own (see test_norm_cuda.py).
//
// Blocks run one after the other; the threads of a block are fibers that take turns between the points where they meet.
// A barrier or shuffle that some threads skip, an asynchronous copy used before it is waited for, and dynamic shared
// memory read before it is written (it holds NaNs as a block starts) show as failures; a race between two such points
// shows where running blocks and threads in the opposite order changes a result.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define CUDA CPU  // the dispatch key under which the ops are registered

// The language.

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads, blocks)
#define __shared__ thread_local  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kProcessors = 3, kBlocksOfOne = 2, kSharedMemory = 227 * 1024;
inline int allowed_by_device = kSharedMemory;
inline bool scrambled = false;  // runs blocks, and threads between their meetings, in the opposite order

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  char waits_at = 0;
};

inline std::vector<Fiber> fibers;
inline std::unique_ptr<char[]> stacks;
inline jmp_buf scheduler;
inline int current = 0;
inline std::function<void()> body;
inline std::vector<std::array<char, 8>> exchanged;  // what each thread shows its warp

constexpr size_t kStack = 64 * 1024;

inline void enter() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Lets the others run until all have come as far, to the same `place`.
inline void meet(char place) {
  fibers[current].waits_at = place;
  if (!_setjmp(fibers[current].state)) _longjmp(scheduler, 1);
}

inline void resume(int thread) {
  current = thread;
  threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack = {stacks.get() + thread * kStack, 0, kStack};
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

// One block. All its threads meet at every shuffle and barrier until they end: stricter than CUDA, as the kernels are.
inline void run_block(int threads) {
  fibers.assign(threads, {});
  exchanged.resize(threads);
  for (char place = 1; place;) {
    place = 0;
    for (int i = 0; i < threads; ++i) {
      const int thread = scrambled ? threads - 1 - i : i;
      Fiber& fiber = fibers[thread];
      if (fiber.done) continue;
      resume(thread);
      if (fiber.done) continue;
      if (place && fiber.waits_at != place) std::abort();
      place = fiber.waits_at;
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::meet('b'); }
inline void __threadfence() {}

namespace emulator {

// The value of lane `of` of this thread's warp; every lane comes here.
template <class T>
T shuffle(T value, int of) {
  std::memcpy(&exchanged[current], &value, sizeof(T));
  meet('w');
  const int other = current / 32 * 32 + of;
  T result;
  std::memcpy(&result, exchanged[other].data(), sizeof(T));
  meet('r');
  return result;
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, emulator::current % 32 ^ offset);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::shuffle(value, lane);
}
inline unsigned atomicAdd(unsigned* counter, unsigned more) { return std::exchange(*counter, *counter + more); }
template <class T>
T __ldcg(const T* pointer) {
  return *pointer;
}

// An asynchronous copy arrives as late as it may: at the wait that asks for it.
namespace emulator {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
inline std::vector<std::vector<std::vector<Copy>>> copies;  // of each thread, of each commit; the last one is open

inline std::vector<std::vector<Copy>>& own_copies() {
  if (copies.size() <= static_cast<size_t>(current)) copies.resize(current + 1, {{}});
  return copies[current];
}

}  // namespace emulator

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) std::abort();
  emulator::own_copies().back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { emulator::own_copies().emplace_back(); }
inline void __pipeline_wait_prior(size_t newest) {
  auto& commits = emulator::own_copies();
  for (; commits.size() > newest + 1; commits.erase(commits.begin()))
    for (const auto& copy : commits.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

struct __nv_bfloat162 {
  torch::headeronly::BFloat16 x, y;
};
struct __half2 {
  torch::headeronly::Half x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 two) { return {two.x, two.y}; }
inline float2 __half22float2(__half2 two) { return {two.x, two.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }

// The runtime.

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return "launch refused"; }

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? emulator::kProcessors : emulator::allowed_by_device;
  return 0;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace emulator {
inline size_t allowed_shared = 48 * 1024;
}
template <class P>
int cudaFuncSetAttribute(void (*)(P), cudaFuncAttribute, int bytes) {
  emulator::allowed_shared = bytes;
  return 0;
}
template <class P>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P), int, size_t) {
  *blocks = emulator::kBlocksOfOne;
  return 0;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace megahp {
inline thread_local uint4 shared_memory[emulator::kSharedMemory / sizeof(uint4)];
}

template <class P>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P), const P& parameters) {
  using namespace emulator;
  const unsigned threads = config->blockDim.x * config->blockDim.y, blocks = config->gridDim.x * config->gridDim.y;
  if (threads == 0 || threads > 1024 || threads % 32 || blocks == 0) return 1;
  if (config->dynamicSmemBytes > allowed_shared) return 1;
  allowed_shared = 48 * 1024;
  if (!stacks) stacks.reset(new char[1024 * kStack]);
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  body = [=] { kernel(parameters); };
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = scrambled ? blocks - 1 - i : i;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x);
    std::memset(megahp::shared_memory, 0xff, sizeof megahp::shared_memory);
    copies.clear();
    run_block(static_cast<int>(threads));
  }
  return 0;
}

// What torch's CUDA build has and a CPU build lacks, or does for GPUs only.

extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, TORCH_SUCCESS; }
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return TORCH_SUCCESS; }
[[gnu::visibility("default")]] void emulator_scramble(bool on) { emulator::scrambled = on; }
[[gnu::visibility("default")]] void emulator_shared_memory(int bytes) { emulator::allowed_by_device = bytes; }
}
