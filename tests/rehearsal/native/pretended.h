// What the two halves of the pretended device share: device.cpp (memory, streams, generators) and operators.cpp.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/Allocator.h>

namespace pretended {
#ifdef PRETENDED_MPS
#define PRETENDED_KEY MPS
constexpr auto KIND = c10::DeviceType::MPS;
constexpr auto KEY = c10::DispatchKey::MPS;
constexpr const char* NAME = "mps";
#else
#define PRETENDED_KEY CUDA
constexpr auto KIND = c10::DeviceType::CUDA;
constexpr auto KEY = c10::DispatchKey::CUDA;
constexpr const char* NAME = "cuda";
#endif
constexpr int MOST = 16;  // devices

c10::DeviceIndex current();
void make_current(c10::DeviceIndex);
int count();
c10::Allocator* allocator();
at::Generator& default_generator(c10::DeviceIndex);   // -1: of the current device
at::Generator& host_generator(const at::Generator&);  // the CPU's generator inside one of the device
bool pinned(const void*);
void tell(const char* kind, const char* what, int64_t bytes);  // an event for the record, see `record.py`

inline c10::DeviceIndex index_of(c10::Device device) { return device.index() < 0 ? current() : device.index(); }
inline bool on_device(const at::Tensor& tensor) { return tensor.device().type() == KIND; }

struct On {  // makes a device the current one while it lives
  c10::DeviceIndex before = current();
  explicit On(c10::Device device) { make_current(index_of(device)); }
  ~On() { make_current(before); }
};
}  // namespace pretended
