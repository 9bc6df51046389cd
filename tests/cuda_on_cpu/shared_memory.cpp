// One arena for the shared memory of the block that runs. Before a block everything is 0xff, which
// is NaN in every float type, and stays so where nobody writes. In front of and behind what the
// launch asked for lies a red zone that must keep its 0xff; AddressSanitizer forbids it and all
// that follows.
//
// Each 16 bytes have a state, by which instructions that go through here see what they must not
// read: copies that have not arrived, and for wgmma what a copy wrote that no fence_async followed.
// Ordinary loads and stores are not seen here (watch.cpp sees them, in that mode).

#include <cstring>

#include "runtime.h"

#ifdef RESNET_FUSED_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size)
#define ASAN_UNPOISON_MEMORY_REGION(start, size)
#endif

namespace resnet_fused::cuda::on_cpu {

size_t shared_bytes;
Granule granules[kMostShared / kGranule];

namespace {

constexpr size_t kRedZone = 1024;
constexpr int kPoison = 0xff;

struct Arena {
  alignas(1024) unsigned char before[kRedZone];
  unsigned char shared[kMostShared];
  unsigned char after[kRedZone];
};
Arena arena;

}  // namespace

void prepare_shared(size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(&arena, sizeof(arena));
  std::memset(arena.before, kPoison, kRedZone);
  std::memset(arena.shared, kPoison, bytes + kRedZone);
  std::memset(granules, 0, (bytes + kGranule - 1) / kGranule);
  ASAN_POISON_MEMORY_REGION(arena.before, kRedZone);
  ASAN_POISON_MEMORY_REGION(arena.shared + bytes, kMostShared - bytes + kRedZone);
}

void check_red_zones() {
  ASAN_UNPOISON_MEMORY_REGION(&arena, sizeof(arena));
  for (size_t i = 0; i < kRedZone && block.error.empty(); ++i) {
    const bool before = arena.before[kRedZone - 1 - i] != kPoison;
    const unsigned char* const behind = arena.shared + shared_bytes + i;
    if (!before && *behind == kPoison) continue;
    std::ostringstream text;
    text << block_name() << ": something was written " << i + (before ? 1 : 0) << " bytes "
         << (before ? "before the start" : "behind the end") << " of " << shared_bytes
         << " bytes of shared memory";
    block.error = text.str();
  }
}

uint32_t shared_offset(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - arena.shared);
}

void check_shared(const void* pointer, uint32_t bytes, uint32_t alignment, const char* name,
                  Site site) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(arena.shared);
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  if (at < start || at + bytes > start + shared_bytes) {
    const auto offset = static_cast<int64_t>(at - start);
    if (at < start - kRedZone || at >= start + kMostShared + kRedZone) {
      fail(site, name, ": the pointer is not one into shared memory");
    }
    fail(site, name, ": bytes ", offset, " to ", offset + bytes, " are outside the ", shared_bytes,
         " bytes of shared memory");
  }
  if (at % alignment != 0) {
    fail(site, name, ": byte ", at - start, " of shared memory is not aligned to ", alignment);
  }
}

void check_source(const Copy& copy, const char* name) {
  check_aligned(copy.from, 16, name, copy.site);
#ifdef RESNET_FUSED_ASAN
  if (const void* bad =
          __asan_region_is_poisoned(const_cast<unsigned char*>(copy.from), copy.bytes)) {
    fail(copy.site, name, ": byte ", static_cast<const unsigned char*>(bad) - copy.from, " of ",
         copy.bytes, " to be read is outside of any allocation");
  }
#endif
}

void take_away(const Copy& copy) {
  const uint32_t offset = shared_offset(copy.to);
  for (uint32_t i = 0; i < copy.bytes; i += kGranule) {
    Granule& state = granules[(offset + i) / kGranule];
    if (state == Granule::in_flight) {
      fail(copy.site, "a copy to byte ", offset + i,
           " of shared memory starts while another one to it is under way");
    }
    state = Granule::in_flight;
  }
  std::memset(copy.to, kPoison, copy.bytes);
  ASAN_POISON_MEMORY_REGION(copy.to, copy.bytes);
}

void arrive(const Copy& copy, Granule then) {
  ASAN_UNPOISON_MEMORY_REGION(copy.to, copy.bytes);
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  const uint32_t offset = shared_offset(copy.to);
  for (uint32_t i = 0; i < copy.bytes; i += kGranule) granules[(offset + i) / kGranule] = then;
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

unsigned char* shared_memory() {
  return on_cpu::arena.shared;
}

uint32_t shared_address(const void* pointer, Site site) {
  on_cpu::check_shared(pointer, 0, 1, "shared_address", site);
  return on_cpu::kSharedBase + on_cpu::shared_offset(pointer);
}

void check_aligned(const void* pointer, uintptr_t alignment, const char* name, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) {
    on_cpu::fail(site, name, ": the address is not aligned to ", alignment, " bytes");
  }
}

}  // namespace resnet_fused::cuda
