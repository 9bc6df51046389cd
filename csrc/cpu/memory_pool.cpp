#include "memory_pool.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resnet_fused {
namespace {

constexpr size_t kPage = size_t(4) << 10;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSmallest = size_t(1) << 20;
// From here on scratch memory, which is read again and again, takes a huge page: of small pages
// chance may put too many into the same sets of L2, for as long as the process lives.
constexpr size_t kHugeScratch = size_t(256) << 10;

struct Block {
  char* data;
  size_t bytes;
};

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)

size_t rounded(size_t bytes) {
  const size_t unit = bytes < kHugePage ? kPage : kHugePage;
  return (bytes + unit - 1) / unit * unit;
}

// mmap rather than aligned_alloc: with madvise on malloc's memory the gain was lost (half the
// speed).
char* system_allocate(size_t bytes) {
  const size_t slack = bytes < kHugePage ? 0 : kHugePage;
  void* mapped =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (slack == 0) return static_cast<char*>(mapped);
  char* begin = static_cast<char*>(mapped);
  const size_t head = (kHugePage - reinterpret_cast<size_t>(begin) % kHugePage) % kHugePage;
  if (head > 0) munmap(begin, head);
  if (slack > head) munmap(begin + head + bytes, slack - head);
  madvise(begin + head, bytes, MADV_HUGEPAGE);  // a hint: failure costs speed only
  return begin + head;
}

void system_free(Block block) {
  munmap(block.data, block.bytes);
}

#else

// AddressSanitizer sees what lies beyond a block of just the size that was asked for.
size_t rounded(size_t bytes) {
  return bytes;
}

char* system_allocate(size_t bytes) {
  return static_cast<char*>(::operator new(bytes, std::align_val_t(64), std::nothrow));
}

void system_free(Block block) {
  ::operator delete(block.data, std::align_val_t(64));
}

#endif

class MemoryPool {
 public:
  Block allocate(size_t bytes) {
    bytes = rounded(bytes);
    if (Block block = take(bytes); block.data != nullptr) return block;
    char* data = system_allocate(bytes);
    if (data == nullptr) {
      release();
      data = system_allocate(bytes);
    }
    check(data != nullptr, "memory_pool: cannot allocate ", bytes, " bytes");
    return {data, bytes};
  }

  // Runs in destructors of tensors, and where memory has run out: it needs none.
  void free(Block block) noexcept {
    std::vector<Block> evicted;
    if (!keep(block, evicted)) system_free(block);
    for (const Block& old : evicted) system_free(old);
  }

  void release() {
    std::vector<Block> blocks;
    if (std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      blocks.swap(idle_);
      idle_bytes_ = 0;
    }
    for (const Block& block : blocks) system_free(block);
  }

  size_t idle_bytes() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock ? idle_bytes_ : 0;
  }

 private:
  // Makes a block an idle one, and gives those to free for it, the longest idle first. False if
  // nothing has changed.
  bool keep(Block block, std::vector<Block>& evicted) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > limit_) return false;
    try {
      evicted.reserve(idle_.size());
      idle_.push_back(block);
    } catch (const std::bad_alloc&) {
      return false;
    }
    while (idle_bytes_ + block.bytes > limit_) {
      evicted.push_back(idle_.front());
      idle_bytes_ -= idle_.front().bytes;
      idle_.erase(idle_.begin());
    }
    idle_bytes_ += block.bytes;
    return true;
  }

  // The best fitting idle block, if it wastes at most a half of the request. Latest first: it may
  // still be in cache.
  Block take(size_t bytes) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return {nullptr, 0};
    size_t best = idle_.size();
    for (size_t i = idle_.size(); i-- > 0;) {
      const size_t size = idle_[i].bytes;
      if (size >= bytes && size <= bytes + bytes / 2 &&
          (best == idle_.size() || size < idle_[best].bytes))
        best = i;
    }
    if (best == idle_.size()) return {nullptr, 0};
    const Block block = idle_[best];
    idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
    idle_bytes_ -= block.bytes;
    return block;
  }

  static size_t limit_from_environment() {
    const char* text = std::getenv("RESNET_FUSED_POOL_BYTES");
    if (text == nullptr || *text == '\0') return size_t(512) << 20;
    char* end = nullptr;
    const unsigned long long value = std::strtoull(text, &end, 10);
    check(*end == '\0' && *text != '-', "RESNET_FUSED_POOL_BYTES must be a number of bytes, got '",
          text, "'");
    return value;
  }

  // Never waited for: a forked child may inherit it locked, and falls back to the system then.
  std::mutex mutex_;
  std::vector<Block> idle_;  // the longest idle first
  size_t idle_bytes_ = 0;
  const size_t limit_ = limit_from_environment();
};

MemoryPool& pool() {
  static MemoryPool* const instance = new MemoryPool;  // outlives tensors that die at exit
  return *instance;
}

// A block that goes back to the pool once.
struct Lease {
  explicit Lease(size_t bytes) : block(pool().allocate(bytes)) {}
  ~Lease() { end(); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  void end() noexcept {
    const Block last = std::exchange(block, {nullptr, 0});
    if (last.data != nullptr) pool().free(last);
  }

  Block block;
};

}  // namespace

size_t element_size(ScalarType dtype) {
  using torch::stable::detail::from;
  return aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(from(dtype)));
}

namespace {

// Of a tensor without gaps; sizes may be anything.
size_t checked_bytes(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t bytes = static_cast<int64_t>(element_size(dtype));
  for (const int64_t size : sizes) {
    check(size >= 0 && !__builtin_mul_overflow(bytes, std::max<int64_t>(size, 1), &bytes),
          "memory_pool: cannot allocate a tensor of shape ", shape_text(sizes));
  }
  return std::find(sizes.begin(), sizes.end(), 0) == sizes.end() ? static_cast<size_t>(bytes) : 0;
}

Tensor empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle;
  using torch::stable::detail::from;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor pool_empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                          ScalarType dtype) {
  const size_t bytes = checked_bytes(sizes, dtype);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  if (bytes < kSmallest) return empty_strided(sizes, strides, dtype);
  const auto lease = std::make_shared<Lease>(bytes);
  try {
    return torch::stable::from_blob(lease->block.data, sizes, strides, cpu, dtype,
                                    [lease](void*) { lease->end(); });
  } catch (...) {  // torch may have called that or lost it
    lease->end();
    throw;
  }
}

Tensor pool_empty(IntHeaderOnlyArrayRef sizes, MemoryFormat format, ScalarType dtype) {
  checked_bytes(sizes, dtype);  // so that no stride overflows
  const std::vector<int64_t> strides = dense_strides(sizes, format);
  return pool_empty_strided(sizes, IntHeaderOnlyArrayRef(strides.data(), strides.size()), dtype);
}

Workspace::Workspace(size_t floats) {
  if (floats == 0) return;
  const size_t bytes = floats * sizeof(float);
  const Block block = pool().allocate(bytes < kHugeScratch ? bytes : std::max(bytes, kHugePage));
  data_ = reinterpret_cast<float*>(block.data);
  bytes_ = block.bytes;
}

Workspace::~Workspace() {
  if (data_ != nullptr) pool().free({reinterpret_cast<char*>(data_), bytes_});
}

void pool_release() {
  pool().release();
}
size_t pool_idle_bytes() {
  return pool().idle_bytes();
}

}  // namespace resnet_fused
