// Memory, streams, events and generators of a pretended device: it is called "cuda" (or "mps"), its memory is the
// host's.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <mutex>
#include <unordered_set>

#include "pretended.h"

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using c10::StreamId;

namespace pretended {
int g_count = 1;
thread_local DeviceIndex t_current = 0;
thread_local std::array<StreamId, MOST> t_stream{};
std::atomic<StreamId> g_next_stream{1};
void (*g_listener)(const char*, const char*, int64_t) = nullptr;
std::array<std::atomic<int64_t>, MOST> g_bytes{}, g_peak{};
std::mutex g_pinned_lock;
std::unordered_set<const void*> g_pinned;

DeviceIndex current() { return t_current; }
void make_current(DeviceIndex index) { t_current = index; }
int count() { return g_count; }
void tell(const char* kind, const char* what, int64_t bytes) {
  if (g_listener) g_listener(kind, what, bytes);
}
bool pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(g_pinned_lock);
  return g_pinned.count(pointer) > 0;
}

struct Block {
  c10::DataPtr data;
  int64_t size;
  DeviceIndex device;
};
void release(void* context) {
  auto* block = static_cast<Block*>(context);
  g_bytes[block->device] -= block->size;
  delete block;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto data = c10::GetCPUAllocator()->allocate(size);
    void* pointer = data.get();
    auto& bytes = g_bytes[t_current];
    auto& peak = g_peak[t_current];
    if ((bytes += size) > peak) peak = bytes.load();
    return {pointer, new Block{std::move(data), (int64_t)size, t_current}, &release, Device(KIND, t_current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
DeviceAllocator g_allocator;
c10::Allocator* allocator() { return &g_allocator; }

void unpin(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(g_pinned_lock);
    g_pinned.erase(block->data.get());
  }
  delete block;
}
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto data = c10::GetCPUAllocator()->allocate(size);
    void* pointer = data.get();
    {
      std::lock_guard<std::mutex> lock(g_pinned_lock);
      g_pinned.insert(pointer);
    }
    return {pointer, new Block{std::move(data), (int64_t)size, 0}, &unpin, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
PinnedAllocator g_pinned_allocator;

struct DeviceGenerator final
    : c10::GeneratorImpl {  // draws other numbers than the CPU's for the same seed, as CUDA does
  at::Generator inner;
  uint64_t seed_ = 0;
  explicit DeviceGenerator(DeviceIndex index)
      : c10::GeneratorImpl(Device(KIND, index), c10::DispatchKeySet(KEY)), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override {
    inner.set_current_seed(seed ^ 0x5DEECE66DULL);
    seed_ = seed;
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override { return seed_ = inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new DeviceGenerator(device().index());
    copy->inner = inner.clone();
    copy->seed_ = seed_;
    return copy;
  }
};
at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int number = 0; number < MOST; number++)
      made.push_back(at::make_generator<DeviceGenerator>((DeviceIndex)number));
    return made;
  }();
  return all.at(index < 0 ? t_current : index);
}
at::Generator& host_generator(const at::Generator& given) {
  return static_cast<DeviceGenerator*>(given.unsafeGetGeneratorImpl())->inner;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return KIND; }
  Device exchangeDevice(Device device) const override {
    auto old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(KIND, t_current); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < g_count, "CUDA error: invalid device ordinal");
    if (device.index() >= 0) t_current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) t_current = device.index();
  }
  Stream stream(Device device, StreamId id) const { return Stream(Stream::UNSAFE, Device(KIND, index_of(device)), id); }
  Stream getStream(Device device) const override { return stream(device, t_stream[index_of(device)]); }
  Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  Stream getNewStream(Device device, int = 0) const override { return stream(device, g_next_stream++); }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override { return getNewStream(device); }
  Stream exchangeStream(Stream next) const override {
    auto old = getStream(next.device());
    t_stream[index_of(next.device())] = next.id();
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return g_count; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = (void*)1;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { tell("sync", "synchronizeStream", 0); }
  void synchronizeEvent(void*) const override { tell("sync", "synchronizeEvent", 0); }
  void synchronizeDevice(const DeviceIndex) const override { tell("sync", "synchronizeDevice", 0); }
};
C10_REGISTER_GUARD_IMPL(PRETENDED_KEY, Guard)
}  // namespace pretended

namespace at {
using namespace pretended;
template <class Interface>
struct Hooks : Interface {  // what both kinds of hooks have
  void init() const override {}
  const Generator& getDefaultGenerator(DeviceIndex index = -1) const override { return default_generator(index); }
  Generator getNewGenerator(DeviceIndex index = -1) const override {
    return make_generator<DeviceGenerator>(index < 0 ? t_current : index);
  }
  Device getDeviceFromPtr(void*) const override { return Device(KIND, t_current); }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isPinnedPtr(const void* pointer) const override { return pinned(pointer); }
  Allocator* getPinnedMemoryAllocator() const override { return &g_pinned_allocator; }
  DeviceIndex deviceCount() const override { return g_count; }
  void setCurrentDevice(DeviceIndex index) const override { t_current = index; }
  DeviceIndex getCurrentDevice() const override { return t_current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(t_current, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return index < 0 ? t_current : std::exchange(t_current, index);
  }
};
#ifdef PRETENDED_MPS
struct PretendedHooks : Hooks<MPSHooksInterface> {
  bool hasMPS() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  Allocator* getMPSDeviceAllocator() const override { return allocator(); }
  void deviceSynchronize() const override { tell("sync", "deviceSynchronize", 0); }
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return g_bytes[0]; }
  size_t getDriverAllocatedMemory() const override { return g_bytes[0]; }
  size_t getRecommendedMaxMemory() const override { return 16LL << 30; }
};
C10_REGISTER_TYPED_CLASS(MPSHooksRegistry, "MPSHooks", PretendedHooks)
#else
struct PretendedHooks : Hooks<CUDAHooksInterface> {
  explicit PretendedHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  DeviceIndex current_device() const override { return t_current; }
  int getNumGPUs() const override { return g_count; }
  Allocator* getCUDADeviceAllocator() const override { return allocator(); }
  std::string showConfig() const override { return "pretended CUDA"; }
  void deviceSynchronize(DeviceIndex) const override { tell("sync", "deviceSynchronize", 0); }
};
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", PretendedHooks)
#endif
}  // namespace at

extern "C" {
void pretended_begin(int devices) {
  pretended::g_count = devices;
  c10::SetAllocator(pretended::KIND, pretended::allocator(), 99);
}
void pretended_listen(void (*listener)(const char*, const char*, int64_t)) { pretended::g_listener = listener; }
int pretended_current() { return pretended::t_current; }
void pretended_set(int index) { pretended::t_current = index; }
int64_t pretended_bytes(int index) { return pretended::g_bytes[index]; }
int64_t pretended_peak(int index, int reset) {
  auto peak = pretended::g_peak[index].load();
  if (reset) pretended::g_peak[index] = pretended::g_bytes[index].load();
  return peak;
}
}
