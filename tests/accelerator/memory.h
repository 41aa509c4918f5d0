// Memory of the pretended devices, pinned memory of the host, and copies that are still on their way.
//
// A device's memory is the host's, handed out under an address that no process can have: who follows it on the host dies
// of a segmentation fault in that line. Everything is counted.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/copy_ops.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

namespace accelerator {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr int kMost = 8;

inline int device_count() {
  static const int count = [] {
    const char* asked = std::getenv("QCONV_EMU_DEVICES");
    return asked ? std::min(std::max(std::atoi(asked), 1), kMost) : 2;
  }();
  return count;
}

// ------------------------------------------------------------------------------------------------------- counting

enum Count { kToDevice, kBytesToDevice, kPageable, kToHost, kBytesToHost, kPeer, kBytesPeer, kWaits, kLaunches, kCounts };

inline std::array<std::array<std::atomic<int64_t>, kCounts>, kMost> counts{};

inline void count(DeviceIndex device, Count what, int64_t by = 1) { counts[device][what] += by; }

// ------------------------------------------------------------------------------------------- addresses of a device

// Canonical addresses of x86-64 and AArch64 repeat bit 47 (or 55) in all bits above it; these do not.
constexpr uint64_t kMark = uint64_t{0x5A} << 48;
constexpr uint64_t kAddress = (uint64_t{1} << 48) - 1;

inline void* marked(void* host) {
  return host ? reinterpret_cast<void*>(reinterpret_cast<uint64_t>(host) | kMark) : nullptr;
}
inline void* unmarked(const void* device) {
  return reinterpret_cast<void*>(reinterpret_cast<uint64_t>(device) & kAddress);
}

// ------------------------------------------------------------------------------------------------ device memory

inline thread_local DeviceIndex current = 0;

/// Within its scope, `current` is another device.
struct OnDevice {
  DeviceIndex before = current;
  explicit OnDevice(DeviceIndex device) { current = device; }
  ~OnDevice() { current = before; }
};

constexpr size_t kGranule = 512;  // as CUDA's caching allocator rounds
constexpr int kGarbage = 0xFF;    // NaN in every float, -1 in every integer

struct Memory final : c10::DeviceAllocator {
  struct Use {
    int64_t now = 0, peak = 0, ever = 0, most = INT64_MAX, refused = 0;
  };
  struct Block {
    void* host;
    size_t size;
    DeviceIndex device;
  };
  std::mutex lock;
  std::array<Use, kMost> uses;

  c10::DataPtr allocate(size_t asked) override {
    const DeviceIndex device = current;
    if (asked == 0) return {nullptr, nullptr, nullptr, Device(kType, device)};
    const size_t size = (asked + kGranule - 1) / kGranule * kGranule;
    {
      std::lock_guard<std::mutex> guard(lock);
      Use& use = uses[device];
      if (use.now + static_cast<int64_t>(size) > use.most) {
        ++use.refused;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "emu:", int(device), " out of memory: ", asked, " bytes asked for, ",
                         use.now, " of ", use.most, " in use");
      }
      use.now += size, use.ever += size, use.peak = std::max(use.peak, use.now);
    }
    void* host = std::aligned_alloc(kGranule, size);
    TORCH_CHECK(host, "the host's own memory is used up");
    std::memset(host, kGarbage, size);
    return {marked(host), new Block{host, size, device}, &Memory::free, Device(kType, device)};
  }
  static void free(void* context);

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(unmarked(to), unmarked(from), size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    const Use& use = uses[device];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* kind : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      auto& all = (*kind)[0];
      all.current = use.now, all.peak = use.peak, all.allocated = use.ever, all.freed = use.ever - use.now;
    }
    stats.num_ooms = use.refused;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    uses[device].peak = uses[device].now;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(lock);
    const int64_t total = std::min(uses[device].most, int64_t{1} << 40);
    return {std::max<int64_t>(0, total - uses[device].now), total};
  }
  void cap(DeviceIndex device, int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    uses[device].most = bytes < 0 ? INT64_MAX : bytes;
  }
};

inline Memory memory;

inline void Memory::free(void* context) {
  auto* block = static_cast<Block*>(context);
  std::memset(block->host, kGarbage, block->size);
  std::free(block->host);
  {
    std::lock_guard<std::mutex> guard(memory.lock);
    memory.uses[block->device].now -= block->size;
  }
  delete block;
}

// ------------------------------------------------------------------------------------------------- pinned memory

struct Pinned final : c10::Allocator {
  std::mutex lock;
  std::map<uintptr_t, size_t> blocks;  // by address

  c10::DataPtr allocate(size_t asked) override {
    const size_t size = std::max(kGranule, (asked + kGranule - 1) / kGranule * kGranule);
    void* host = std::aligned_alloc(kGranule, size);
    std::lock_guard<std::mutex> guard(lock);
    blocks[reinterpret_cast<uintptr_t>(host)] = size;
    return {host, host, &Pinned::free, Device(c10::DeviceType::CPU)};
  }
  static void free(void* host);
  c10::DeleterFnPtr raw_deleter() const override { return &Pinned::free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
  bool holds(const void* address) {
    const auto wanted = reinterpret_cast<uintptr_t>(address);
    std::lock_guard<std::mutex> guard(lock);
    const auto above = blocks.upper_bound(wanted);
    if (above == blocks.begin()) return false;
    const auto& [start, size] = *std::prev(above);
    return wanted < start + size;
  }
};

inline Pinned pinned;

inline void Pinned::free(void* host) {
  {
    std::lock_guard<std::mutex> guard(pinned.lock);
    pinned.blocks.erase(reinterpret_cast<uintptr_t>(host));
  }
  std::free(host);
}

// ------------------------------------------------------------------------------------------ copies on their way
//
// A copy between a device and pinned memory that does not block may end when the device is next waited for, no sooner.
// So until then what it brings to the host is garbage there, and what it takes from the host must stay as it was.

struct Flight {
  Tensor host, content;
  bool arrives;  // on the host
};

inline std::mutex flights_lock;
inline std::array<std::vector<Flight>, kMost> flights;

inline void take_off(DeviceIndex device, Flight one) {
  std::lock_guard<std::mutex> guard(flights_lock);
  flights[device].push_back(std::move(one));
}

/// The host waits for a device.
inline void wait(DeviceIndex device) {
  count(device, kWaits);
  std::vector<Flight> landing;
  {
    std::lock_guard<std::mutex> guard(flights_lock);
    landing.swap(flights[device]);
  }
  for (const Flight& one : landing) {
    if (one.arrives) {
      at::_ops::copy_::call(const_cast<Tensor&>(one.host), one.content, false);
    } else {
      const bool same = std::memcmp(one.host.const_data_ptr(), one.content.const_data_ptr(), one.host.nbytes()) == 0;
      TORCH_CHECK(same, "pinned memory changed while it was being copied to emu:", int(device));
    }
  }
}

}  // namespace accelerator
