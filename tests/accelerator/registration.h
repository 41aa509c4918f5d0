// What torch must be told of a device: guards, streams and events, hooks, and which functions are whose.
#pragma once

namespace accelerator {

inline thread_local std::array<c10::StreamId, kMost> streams{};
inline std::atomic<c10::StreamId> next_stream{1};

/// Operations run at once, so streams have names and nothing to order, and events are always past.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static DeviceIndex index(Device device) { return device.has_index() ? device.index() : current; }
  static c10::Stream stream(DeviceIndex device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, Device(kType, device), id);
  }
  c10::DeviceType type() const override { return kType; }
  Device getDevice() const override { return Device(kType, current); }
  void setDevice(Device device) const override {
    TORCH_CHECK(index(device) < device_count(), "there is no ", device);
    current = index(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current = index(device); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override { return stream(index(device), streams[index(device)]); }
  c10::Stream getDefaultStream(Device device) const override { return stream(index(device), 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return stream(index(device), next_stream++); }
  c10::Stream getNewStream(Device device, int) const override { return stream(index(device), next_stream++); }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const c10::Stream before = stream(to.device_index(), streams[to.device_index()]);
    streams[to.device_index()] = to.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new DeviceIndex(stream.device_index());
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<DeviceIndex*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count()); }
  void synchronizeStream(const c10::Stream& stream) const override { wait(stream.device_index()); }
  void synchronizeEvent(void* event) const override {
    if (event) wait(*static_cast<DeviceIndex*>(event));
  }
  void synchronizeDevice(const DeviceIndex device) const override { wait(device < 0 ? current : device); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 0.0; }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count()); }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kType, device)); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice(Device(kType, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* address) const override { return pinned.holds(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    static std::vector<at::Generator> made = [] {
      std::vector<at::Generator> all;
      for (int index = 0; index < device_count(); ++index) all.push_back(at::make_generator<Generator>(index));
      return all;
    }();
    return made[device < 0 ? current : device];
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto* held = storage.unsafeGetStorageImpl();
    OnDevice scope(held->device().index());
    c10::DataPtr grown = memory.allocate(size);
    if (const size_t kept = std::min(size, held->nbytes()))
      std::memcpy(unmarked(grown.get()), host_address(*held), kept);
    held->set_data_ptr_noswap(std::move(grown));
    held->set_nbytes(size);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

const bool kRegistered = [] {
  c10::SetAllocator(kType, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

inline std::vector<int64_t> counters(int64_t device) { return {counts[device].begin(), counts[device].end()}; }
inline void cap(int64_t device, int64_t bytes) { memory.cap(static_cast<DeviceIndex>(device), bytes); }
inline int64_t devices() { return device_count(); }

}  // namespace accelerator

TORCH_LIBRARY(emu, library) {
  library.def("counters(int device) -> int[]", accelerator::counters);
  library.def("cap(int device, int bytes) -> ()", accelerator::cap);
  library.def("devices() -> int", accelerator::devices);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&accelerator::fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", accelerator::empty);
  library.impl("empty_strided", accelerator::empty_strided);
  library.impl("_copy_from", accelerator::copy_from);
  library.impl("_copy_from_and_resize", accelerator::copy_from_and_resize);
  library.impl("_local_scalar_dense", accelerator::item);
  library.impl("record_stream", accelerator::record_stream);
  library.impl("set_.source_Storage_storage_offset", accelerator::set_storage);
  library.impl("set_.source_Storage", accelerator::set_whole);
  library.impl("set_.source_Tensor", accelerator::set_tensor);
  // Made of other operations, which are other ones for a device that torch does not know.
  for (const char* name : {"scaled_dot_product_attention", "convolution", "_convolution"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&accelerator::fallback>());
}
