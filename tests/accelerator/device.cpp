// A pretended accelerator: devices of torch's PrivateUse1 type whose operations the CPU's kernels do, to the same bits.
//
// One boxed fallback stands for all operations: it shows the CPU's kernel the same memory as CPU tensors, so that views,
// operations in place and out= arguments need no copy, and refuses on the way what CUDA refuses.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_local_scalar_dense_ops.h>
#include <ATen/ops/clone_ops.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <unordered_set>

#include "memory.h"

namespace accelerator {

using c10::DispatchKey;
using c10::IValue;

const c10::DispatchKeySet kKeys(DispatchKey::PrivateUse1);

// ---------------------------------------------------------------------------------------------------- new tensors

std::vector<int64_t> contiguous_strides(c10::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size(); dim > 1; --dim)
    strides[dim - 2] = strides[dim - 1] * std::max<int64_t>(sizes[dim - 1], 1);
  return strides;
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "only memory of the host can be pinned");
  const DeviceIndex index = device && device->has_index() ? device->index() : current;
  TORCH_CHECK(index < device_count(), "there is no emu:", int(index), ": ", device_count(), " devices");
  OnDevice scope(index);
  return at::detail::empty_strided_generic(sizes, strides, &memory, kKeys,
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(format.value_or(at::MemoryFormat::Contiguous) == at::MemoryFormat::Contiguous,
              "emu has contiguous tensors alone");
  return empty_strided(sizes, contiguous_strides(sizes), dtype, layout, device, pin);
}

// --------------------------------------------------------------------------- the same memory, as the CPU's tensors

void* host_address(c10::StorageImpl& storage) { return unmarked(storage._mutable_data_ptr_no_checks().get()); }

/// The tensors of one call and the CPU's of the same memory; tensors that share a storage share it there too.
struct Shown {
  struct Storage {
    c10::StorageImpl* device;
    c10::Storage host;
  };
  std::vector<Storage> storages;
  std::vector<std::pair<Tensor, Tensor>> tensors;

  const c10::Storage& storage(c10::StorageImpl* device) {
    const auto known = std::find_if(storages.begin(), storages.end(), [&](auto& one) { return one.device == device; });
    if (known != storages.end()) return known->host;
    c10::DataPtr address(host_address(*device), Device(c10::DeviceType::CPU));
    storages.push_back({device, c10::Storage(c10::Storage::use_byte_size_t(), device->nbytes(), std::move(address),
                                             c10::GetAllocator(c10::DeviceType::CPU), true)});
    return storages.back().host;
  }
  Tensor of(const Tensor& device) {
    c10::Storage host = storage(device.storage().unsafeGetStorageImpl());
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(host), c10::DispatchKeySet(DispatchKey::CPU),
                                                           device.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(device.sizes(), device.strides(), device.storage_offset());
    tensors.emplace_back(device, made);
    return made;
  }
};

Tensor as_host(const Tensor& device) {
  Shown shown;
  return shown.of(device);
}

Tensor on_storage(c10::StorageImpl* storage, const Tensor& like) {
  auto held = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(held)), kKeys, like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

/// A result that a CPU's kernel has made, in memory of a device.
Tensor moved(const Tensor& host, DeviceIndex device) {
  const bool dense = host.is_non_overlapping_and_dense();
  Tensor made = empty_strided(host.sizes(), dense ? host.strides().vec() : contiguous_strides(host.sizes()),
                              host.scalar_type(), std::nullopt, Device(kType, device), std::nullopt);
  if (host.numel()) {
    Tensor seen = as_host(made);
    at::_ops::copy_::call(seen, host, false);
  }
  return made;
}

struct Generator final : c10::GeneratorImpl {
  at::Generator twin = at::detail::createCPUGenerator();
  explicit Generator(DeviceIndex device) : c10::GeneratorImpl(Device(kType, device), kKeys) {}
  void set_current_seed(uint64_t seed) override { twin.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { twin.set_offset(offset); }
  uint64_t get_offset() const override { return twin.get_offset(); }
  uint64_t current_seed() const override { return twin.current_seed(); }
  uint64_t seed() override { return twin.seed(); }
  void set_state(const c10::TensorImpl& state) override { twin.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return twin.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* made = new Generator(device_.index());
    made->set_state(*get_state());
    return made;
  }
};

// ------------------------------------------------------------------------------------------------ any operation

/// Where CUDA waits for the device because a result's size or the host's way on depends on values.
bool waits(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
      "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::histc", "aten::linalg_cholesky", "aten::allclose",
      "aten::repeat_interleave"};
  return names.count(name) != 0;
}

struct Call {
  const std::string& name;
  bool indexes;  // CPU tensors of indices may go with a device's tensor
  DeviceIndex device = -1;
  Shown shown;

  explicit Call(const c10::FunctionSchema& schema)
      : name(schema.name()), indexes(name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0) {}

  [[noreturn]] void refuse(Device one, Device other) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ",
                other, "! (", name, ")");
  }
  void see(Device found) {
    if (found.type() != kType) return;
    const DeviceIndex index = found.has_index() ? found.index() : current;
    if (device < 0) device = index;
    if (device != index) refuse(Device(kType, device), Device(kType, index));
  }
  void see(const IValue& value) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) see(value.toTensor().device());
    } else if (value.isTensorList()) {
      for (const Tensor& one : value.toTensorVector()) see(one.device());
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor>& one : value.toOptionalTensorList())
        if (one && one->defined()) see(one->device());
    } else if (value.isDevice()) {
      see(value.toDevice());
    }
  }
  Tensor show(const Tensor& tensor, bool is_index = false) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() == kType) return shown.of(tensor);
    const bool may_mix = tensor.device().is_cpu() && (tensor.dim() == 0 || (indexes && is_index));
    if (!may_mix) refuse(Device(kType, device), tensor.device());
    return tensor;
  }
  IValue show(const IValue& value) {
    if (value.isTensor()) return show(value.toTensor());
    if (value.isTensorList()) {
      std::vector<Tensor> all;
      for (const Tensor& one : value.toTensorVector()) all.push_back(show(one));
      return all;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const std::optional<Tensor>& one : value.toOptionalTensorList())
        all.push_back(one ? std::optional<Tensor>(show(*one, true)) : std::nullopt);
      return all;
    }
    if (value.isDevice() && value.toDevice().type() == kType) return Device(c10::DeviceType::CPU);
    if (value.isGenerator() && value.toGenerator().defined()) {
      const at::Generator generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == kType, "Expected a 'emu' device type for generator but found '",
                  generator.device().type(), "'");
      return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->twin;
    }
    return value;
  }
  /// What a kernel has done to its arguments besides writing into their memory: resized them, or their storage.
  void take_back() {
    for (auto& one : shown.storages) {
      auto* host = one.host.unsafeGetStorageImpl();
      if (host->nbytes() == one.device->nbytes() && host->data() == host_address(*one.device)) continue;
      OnDevice scope(device);
      c10::DataPtr grown = memory.allocate(host->nbytes());
      if (host->nbytes()) std::memcpy(unmarked(grown.get()), host->data(), host->nbytes());
      one.device->set_data_ptr_noswap(std::move(grown));
      one.device->set_nbytes(host->nbytes());
    }
    for (auto& [ours, theirs] : shown.tensors)
      if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
  }
  Tensor result(const Tensor& host) {
    if (!host.defined() || !host.device().is_cpu()) return host;
    for (auto& [ours, theirs] : shown.tensors)
      if (theirs.is_same(host)) return ours;
    for (auto& one : shown.storages)
      if (host.has_storage() && one.host.unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl())
        return on_storage(one.device, host);
    return moved(host, device);
  }
  IValue result(const IValue& value) {
    if (value.isTensor()) return result(value.toTensor());
    if (!value.isTensorList()) return value;
    std::vector<Tensor> all;
    for (const Tensor& one : value.toTensorVector()) all.push_back(result(one));
    return all;
  }
};

void fallback(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  Call call(operation.schema());
  const size_t first = stack->size() - operation.schema().arguments().size();
  for (size_t at = first; at < stack->size(); ++at) call.see((*stack)[at]);
  if (call.device < 0) call.device = current;
  for (size_t at = first; at < stack->size(); ++at) (*stack)[at] = call.show((*stack)[at]);
  count(call.device, kLaunches);
  if (waits(call.name)) wait(call.device);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    operation.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  }
  call.take_back();
  for (size_t at = stack->size() - operation.schema().returns().size(); at < stack->size(); ++at)
    (*stack)[at] = call.result((*stack)[at]);
}

// --------------------------------------------------------------------------------------------------------- copies

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool reads = from.device().type() == kType, writes = to.device().type() == kType;
  const DeviceIndex device = (writes ? to : from).device().index();
  const auto size = static_cast<int64_t>(from.nbytes());
  const Tensor source = reads ? as_host(from) : from;
  Tensor target = writes ? as_host(to) : to;
  const auto copy = [&] { at::_ops::copy_::call(target, source, false); };
  if (reads && writes) {
    count(device, kLaunches);
    if (from.device() != to.device()) count(device, kPeer), count(device, kBytesPeer, size);
    copy();
    return to;
  }
  const Tensor& host = reads ? to : from;
  const bool is_pinned = size > 0 && pinned.holds(host.const_data_ptr());
  const bool flies = non_blocking && is_pinned && host.is_contiguous() && from.dtype() == to.dtype();
  if (writes) {
    count(device, kToDevice), count(device, kBytesToDevice, size);
    if (!is_pinned) count(device, kPageable);
    copy();
    flies ? take_off(device, {from, at::_ops::clone::call(from, std::nullopt), false}) : wait(device);
    return to;
  }
  count(device, kToHost), count(device, kBytesToHost, size);
  if (flies) {
    take_off(device, {to, at::_ops::clone::call(source, std::nullopt), true});
    std::memset(to.mutable_data_ptr(), kGarbage, to.nbytes());
  } else {
    wait(device);
    copy();
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  TORCH_CHECK(from.sizes() == to.sizes(), "emu copies between equal sizes");
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  const DeviceIndex device = tensor.device().index();
  count(device, kToHost), count(device, kBytesToHost, static_cast<int64_t>(tensor.element_size()));
  wait(device);
  return at::_ops::_local_scalar_dense::call(as_host(tensor));
}

Tensor& set_storage(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef sizes,
                    c10::IntArrayRef strides) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  const auto steps = strides.empty() ? contiguous_strides(sizes) : strides.vec();
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, steps, offset);
  return self;
}
Tensor& set_whole(Tensor& self, c10::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {elements}, {});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
void record_stream(Tensor&, c10::Stream) {}

}  // namespace accelerator

#include "registration.h"
