// A CUDA device that computes on the CPU: torch's CPU build with tensors whose device is "cuda".
//
// Its memory is the host's; its kernels are the CPU's, called by torch's own fallback, which copies to the CPU and
// back. An operator that mixes CUDA and CPU tensors is refused, as by CUDA's kernels. Streams and events are labels:
// all work is done when a call returns, so that races between streams are not seen. "NCCL" is gloo over the same
// memory, and refuses CPU tensors.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/extension.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <utility>

namespace {

constexpr c10::DeviceIndex devices = 4;
thread_local c10::DeviceIndex current_device = 0;
thread_local c10::StreamId current_streams[devices] = {};
std::atomic<c10::StreamId> streams_made{0};

void* allocate_bytes(size_t bytes) {
  void* pointer = nullptr;
  if (bytes > 0) {
    TORCH_CHECK(posix_memalign(&pointer, 64, bytes) == 0, "out of memory");
  }
  return pointer;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = allocate_bytes(bytes);
    return {pointer, pointer, &std::free, {c10::kCUDA, current_device}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

struct PinnedAllocator final : c10::Allocator {
  static inline std::mutex mutex;
  static inline std::set<void*> pointers;

  static void free(void* pointer) {
    std::lock_guard guard(mutex);
    pointers.erase(pointer);
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = allocate_bytes(bytes);
    std::lock_guard guard(mutex);
    pointers.insert(pointer);
    return {pointer, pointer, &PinnedAllocator::free, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedAllocator::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < devices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) {
      current_device = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const override {
    c10::DeviceIndex index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::UNSAFE, {c10::kCUDA, index}, current_streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device.has_index() ? device : getDevice(), ++streams_made);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = this_event;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  double elapsedTime(void*, void*, c10::DeviceIndex) const override { return 1; }
  c10::DeviceIndex deviceCount() const noexcept override { return devices; }

  static inline int token = 0;
  static inline void* const this_event = &token;
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  c10::DeviceIndex current_device() const override { return ::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(c10::DeviceIndex device) const override { ::current_device = device; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  bool isPinnedPtr(const void* pointer) const override {
    std::lock_guard guard(PinnedAllocator::mutex);
    return PinnedAllocator::pointers.count(const_cast<void*>(pointer)) > 0;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  std::string showConfig() const override { return "CUDA on the host"; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.is_cuda()) {
    return tensor;
  }
  void* data = tensor.numel() ? tensor.mutable_data_ptr() : nullptr;
  return at::from_blob(data, tensor.sizes(), tensor.strides(), [tensor](void*) {}, tensor.options().device(c10::kCPU));
}

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory,
    std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  c10::OptionalDeviceGuard guard(device);
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  c10::OptionalDeviceGuard guard(device);
  c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, c10::dtype_or_default(dtype));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  on_host(self).copy_(on_host(source));
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  at::Tensor to = target;
  if (self.sizes() != to.sizes()) {
    to.resize_(self.sizes());
  }
  return to.copy_(self);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  return on_host(self).item();
}

// CUDA's kernels take a CPU tensor beside CUDA ones only if it is a scalar outside a list, or an index.
void refuse_mixed(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t arguments) {
  std::optional<at::Tensor> first;
  const bool is_index = op.operator_name().name.find("index") != std::string::npos;
  auto check = [&](const at::Tensor& tensor, bool in_list) {
    if (!tensor.defined() || (tensor.is_cpu() && (is_index || (tensor.dim() == 0 && !in_list)))) {
      return;
    }
    TORCH_CHECK(
        !first || first->device() == tensor.device(),
        "Expected all tensors to be on the same device, but found at least two devices, ",
        first->device(), " and ", tensor.device(), "! (in ", op.operator_name().name, ")");
    first = tensor;
  };
  for (const c10::IValue& value : torch::jit::last(stack, arguments)) {
    if (value.isTensor()) {
      check(value.toTensor(), false);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        check(tensor, true);
      }
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
        check(tensor.value_or(at::Tensor()), true);
      }
    }
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  refuse_mixed(op, *stack, op.schema().arguments().size());
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", at::native::resize_);
  library.impl("copy_", copy_);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar_dense);
  library.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  library.impl("_fused_sdp_choice", [](const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) -> int64_t { return 0; });
}

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using Done = c10::intrusive_ptr<c10d::Work>;

at::Tensor of_nccl(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cuda(), "NCCL: Tensors must be CUDA and dense, not on ", tensor.device());
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "NCCL: Tensors must be contiguous");
  return on_host(tensor);
}

Tensors of_nccl(const Tensors& tensors) {
  Tensors found;
  for (const at::Tensor& tensor : tensors) {
    found.push_back(of_nccl(tensor));
  }
  return found;
}

Lists of_nccl(const Lists& lists) {
  Lists found;
  for (const Tensors& tensors : lists) {
    found.push_back(of_nccl(tensors));
  }
  return found;
}

struct Nccl final : c10d::Backend {
  explicit Nccl(c10::intrusive_ptr<c10d::Backend> gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo(gloo) {}
  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo->setTimeout(timeout); }

  Done broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    Tensors host = of_nccl(tensors);
    return gloo->broadcast(host, options);
  }
  Done allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    Tensors host = of_nccl(tensors);
    return gloo->allreduce(host, options);
  }
  Done allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    Tensors host = of_nccl(tensors);
    return gloo->allreduce_coalesced(host, options);
  }
  Done reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    Tensors host = of_nccl(tensors);
    return gloo->reduce(host, options);
  }
  Done allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    Lists lists = of_nccl(outputs);
    Tensors host = of_nccl(inputs);
    return gloo->allgather(lists, host, options);
  }
  Done _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    at::Tensor to = of_nccl(output), from = of_nccl(input);
    return gloo->_allgather_base(to, from, options);
  }
  Done allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    Tensors to = of_nccl(outputs), from = of_nccl(inputs);
    return gloo->allgather_into_tensor_coalesced(to, from, options);
  }
  Done gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    Lists lists = of_nccl(outputs);
    Tensors host = of_nccl(inputs);
    return gloo->gather(lists, host, options);
  }
  Done scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    Tensors host = of_nccl(outputs);
    Lists lists = of_nccl(inputs);
    return gloo->scatter(host, lists, options);
  }
  Done reduce_scatter(Tensors& outputs, Lists& inputs, const c10d::ReduceScatterOptions& options) override {
    Tensors host = of_nccl(outputs);
    Lists lists = of_nccl(inputs);
    return gloo->reduce_scatter(host, lists, options);
  }
  Done _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    at::Tensor to = of_nccl(output), from = of_nccl(input);
    return gloo->_reduce_scatter_base(to, from, options);
  }
  Done reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    Tensors to = of_nccl(outputs), from = of_nccl(inputs);
    return gloo->reduce_scatter_tensor_coalesced(to, from, options);
  }
  Done alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& options) override {
    at::Tensor to = of_nccl(output), from = of_nccl(input);
    return gloo->alltoall_base(to, from, output_sizes, input_sizes, options);
  }
  Done alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    Tensors to = of_nccl(outputs), from = of_nccl(inputs);
    return gloo->alltoall(to, from, options);
  }
  Done send(Tensors& tensors, int to, int tag) override {
    Tensors host = of_nccl(tensors);
    return gloo->send(host, to, tag);
  }
  Done recv(Tensors& tensors, int from, int tag) override {
    Tensors host = of_nccl(tensors);
    return gloo->recv(host, from, tag);
  }
  Done barrier(const c10d::BarrierOptions& options) override { return gloo->barrier(options); }

  c10::intrusive_ptr<c10d::Backend> gloo;
};

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  c10::SetAllocator(c10::kCUDA, &device_allocator);
  module.def("nccl", [](c10::intrusive_ptr<c10d::Backend> gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Nccl>(std::move(gloo));
  });
  module.def("resize_storage", [](py::handle handle, size_t bytes) {
    at::Storage storage = torch::createStorage(handle.ptr());
    c10::DeviceIndex before = std::exchange(current_device, storage.device().index());
    c10::DataPtr data = device_allocator.allocate(bytes);
    current_device = before;
    if (size_t kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(data.get(), storage.data(), kept);
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(bytes);
  });
  module.def("current_device", [] { return static_cast<int>(current_device); });
  module.def("exchange_device", [](int device) {
    int before = current_device;
    if (device >= 0) {
      Guard().setDevice({c10::kCUDA, static_cast<c10::DeviceIndex>(device)});
    }
    return before;
  });
}
