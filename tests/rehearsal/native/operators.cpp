// Operators of the pretended device: every one is computed by the CPU's kernel on the same memory.  Refused is what the
// device refuses: tensors of two devices, another device's generator, and on MPS float64.
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <mutex>
#include <set>

#include "pretended.h"

using at::Tensor;
using c10::Device;
using c10::DispatchKeySet;
using c10::IValue;
using c10::Storage;
using namespace pretended;

namespace {
std::set<std::string> g_unchecked,
    g_synchronizing;  // operators whose devices are not compared; that wait for the device

void refuse_double(at::ScalarType dtype) {
#ifdef PRETENDED_MPS
  TORCH_CHECK_TYPE(dtype != at::kDouble && dtype != at::kComplexDouble,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead.");
#endif
}

Tensor renamed(const Tensor& from, Device device) {  // the same memory under another device's name
  auto own = device.type() == KIND;
  auto* kept = new Storage(from.storage());
  c10::DataPtr data(
      const_cast<void*>(from.storage().data()), kept, [](void* one) { delete static_cast<Storage*>(one); }, device);
  Storage storage(Storage::use_byte_size_t(), from.storage().nbytes(), std::move(data),
                  own ? allocator() : c10::GetCPUAllocator(), true);
  auto keys = DispatchKeySet(own ? KEY : c10::DispatchKey::CPU);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, from.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_offset(from.storage_offset());
  impl->set_sizes_and_strides(from.sizes(), from.strides());
  if (from.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (from.is_conj()) impl->_set_conj(true);
  if (from.is_neg()) impl->_set_neg(true);
  return result;
}
Tensor on_host(const Tensor& tensor) { return on_device(tensor) ? renamed(tensor, Device(c10::kCPU)) : tensor; }

struct Call {  // the devices that take part in one call of an operator
  const std::string name;
  bool unchecked;
  std::optional<Device> device;
  bool with_host_tensor = false;
  std::vector<std::pair<Tensor, Tensor>> written;  // of each tensor that is written: it, and its twin on the host

  void clash(Device one, Device other) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ",
                other, "! (when checking argument in method wrapper_", name, ")");
  }
  Tensor argument(const Tensor& tensor, bool writes) {
    if (!tensor.defined()) return tensor;
    if (on_device(tensor)) {
      if (device && *device != tensor.device()) clash(*device, tensor.device());
      device = tensor.device();
      auto twin = on_host(tensor);
      if (writes) written.emplace_back(tensor, twin);
      return twin;
    }
    if (tensor.device().is_cpu() && !(unchecked && tensor.dim() == 0)) with_host_tensor = true;
    return tensor;
  }
  Tensor result(const Tensor& tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu() || tensor.layout() != c10::kStrided || !tensor.has_storage())
      return tensor;
    refuse_double(tensor.scalar_type());
    return renamed(tensor, *device);
  }
  void write_back() const {  // where the CPU's kernel gave a tensor another shape or memory
    for (auto& [tensor, twin] : written) {
      if (twin.storage().data() == tensor.storage().data() && twin.sizes() == tensor.sizes() &&
          twin.strides() == tensor.strides())
        continue;
      auto fresh = renamed(twin, tensor.device());
      auto* impl = tensor.unsafeGetTensorImpl();
      impl->set_storage_keep_dtype(fresh.storage());
      impl->set_storage_offset(fresh.storage_offset());
      impl->set_sizes_and_strides(fresh.sizes(), fresh.strides());
    }
  }
};

void take_argument(Call& call, IValue& value, bool writes) {
  if (value.isTensor()) {
    value = call.argument(value.toTensor(), writes);
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) tensor = call.argument(tensor, writes);
    value = IValue(c10::List<Tensor>(list));
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> fresh;
    for (std::optional<Tensor> tensor : value.toOptionalTensorList().vec())
      fresh.push_back(tensor ? std::optional<Tensor>(call.argument(*tensor, writes)) : tensor);
    value = fresh;
  } else if (value.isDevice() && value.toDevice().type() == KIND) {
    call.device = Device(KIND, index_of(value.toDevice()));
    value = Device(c10::kCPU);
  }
}

bool takes_host_indices(const std::string& name) {
  for (auto prefix : {"aten::index", "aten::_index_put", "aten::_unsafe_index"})
    if (name.rfind(prefix, 0) == 0) return true;
  return false;
}

void set_generator(const Call& call, IValue& value) {
  if (value.isNone()) {
    value = host_generator(default_generator(call.device->index()));
    return;
  }
  auto given = value.toGenerator();
  TORCH_CHECK(given.device().type() == KIND, "Expected a '", NAME, "' device type for generator but found '",
              given.device().type(), "' (", call.name, ")");
  value = host_generator(given);
}

void give_results(const Call& call, const c10::FunctionSchema& schema, const std::vector<IValue>& arguments,
                  torch::jit::Stack* stack) {
  const size_t count = schema.returns().size(), first = stack->size() - count;
  for (size_t number = 0; number < count; number++) {
    auto& value = (*stack)[first + number];
    const auto* alias = schema.returns()[number].alias_info();
    if (alias && alias->isWrite()) {  // the argument itself
      for (size_t which = 0; which < arguments.size(); which++) {
        const auto* other = schema.arguments()[which].alias_info();
        if (other && *other == *alias) {
          value = arguments[which];
          break;
        }
      }
      continue;
    }
    TORCH_CHECK(!alias, "the pretended device has no kernel for the view ", call.name);
    if (value.isTensor())
      value = call.result(value.toTensor());
    else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& tensor : list) tensor = call.result(tensor);
      value = IValue(c10::List<Tensor>(list));
    }
  }
}

void by_cpu(const c10::OperatorHandle& op, DispatchKeySet,
            torch::jit::Stack* stack) {  // every operator without a kernel below
  const auto& schema = op.schema();
  const auto name = schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<IValue> arguments(stack->begin() + begin, stack->end());
  Call call{name, g_unchecked.count(name) > 0};
  int generator = -1;
  for (size_t number = 0; number < count; number++) {
    const auto* alias = schema.arguments()[number].alias_info();
    auto& value = (*stack)[begin + number];
    if (value.isGenerator() ||
        (value.isNone() && schema.arguments()[number].type()->str().find("Generator") != std::string::npos))
      generator = number;
    else
      take_argument(call, value, alias && alias->isWrite());
  }
  if (!call.device) call.device = Device(KIND, current());
  if (call.with_host_tensor && !takes_host_indices(name)) call.clash(*call.device, Device(c10::kCPU));
  if (generator >= 0) set_generator(call, (*stack)[begin + generator]);
  if (call.with_host_tensor) tell("h2d", "indices from the host", 0);
  if (g_synchronizing.count(schema.name())) tell("sync", name.c_str(), 0);
  op.redispatchBoxed(DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.write_back();
  give_results(call, schema, arguments, stack);
}

Device wanted(std::optional<Device> device) {
  auto index = device ? index_of(*device) : current();
  TORCH_CHECK(index < count(), "CUDA error: invalid device ordinal");
  return Device(KIND, index);
}
Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  On on(wanted(device));
  refuse_double(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, allocator(), DispatchKeySet(KEY), c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  On on(wanted(device));
  refuse_double(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, allocator(), DispatchKeySet(KEY),
                                           c10::dtype_or_default(dtype));
}
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  const auto bytes = (int64_t)(from.numel() * from.element_size());
  if (self.device() != from.device()) {
    if (on_device(self) && on_device(from))
      tell("d2d", "copy_", bytes);
    else if (on_device(self))
      tell(non_blocking && (pinned(from.storage().data()) || bytes <= 1 << 16) ? "h2d_async" : "h2d", "copy_", bytes);
    else
      tell(non_blocking ? "d2h_async" : "sync", "copy_ to the host", bytes);
  }
  on_host(self).copy_(on_host(from));
  return self;
}
at::Scalar local_scalar(const Tensor& self) {
  tell("sync", "_local_scalar_dense", self.element_size());
  return on_host(self).item();
}
Tensor& set_storage(Tensor& self, Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_storage_offset(offset);
  if (stride.data() && stride.size() == size.size())
    impl->set_sizes_and_strides(size, stride);
  else
    impl->set_sizes_contiguous(size);
  return self;
}
Tensor& set_only_storage(Tensor& self, Storage source) {
  int64_t count = source.nbytes() / self.element_size();
  return set_storage(self, source, 0, {count}, {});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& self) { return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {}); }
const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (self.sizes() == size) return self;
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve && *format != at::MemoryFormat::Contiguous)
    impl->empty_tensor_restride(*format);
  size_t needed =
      at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.element_size(), self.storage_offset());
  if (needed > self.storage().nbytes()) {
    On on(self.device());
    auto fresh = allocator()->allocate(needed);
    if (self.storage().nbytes()) std::memcpy(fresh.get(), self.storage().data(), self.storage().nbytes());
    self.storage().set_data_ptr_noswap(std::move(fresh));
    self.storage().set_nbytes(needed);
  }
  return self;
}
void record_stream(Tensor&, c10::Stream) {}
}  // namespace

TORCH_LIBRARY_IMPL(_, PRETENDED_KEY, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PRETENDED_KEY, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", [](const Tensor& t, at::IntArrayRef a, at::IntArrayRef b, std::optional<int64_t> o) {
    return at::native::as_strided_tensorimpl(t, a, b, o);
  });
  m.impl("view", [](const Tensor& t, at::IntArrayRef a) { return at::native::view(t, a); });
  m.impl("_reshape_alias",
         [](const Tensor& t, at::IntArrayRef a, at::IntArrayRef b) { return at::native::_reshape_alias(t, a, b); });
  m.impl("unfold", [](const Tensor& t, int64_t d, int64_t s, int64_t p) { return at::native::unfold(t, d, s, p); });
  m.impl("view_as_real", [](const Tensor& t) { return at::native::view_as_real(t); });
  m.impl("view_as_complex", [](const Tensor& t) { return at::native::view_as_complex(t); });
  m.impl("set_.source_Storage", &set_only_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("resize_", &resize_);
  m.impl("record_stream", &record_stream);
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

extern "C" {
void pretended_unchecked(const char* name) { g_unchecked.insert(name); }
void pretended_synchronizing(const char* name) { g_synchronizing.insert(name); }
}
