// How threads go through a tensor whose numbers belong to channels.
//
// A tensor is [outer][channels][inner] without gaps. In rows (inner = 1, channels_last) a thread
// owns the n channels of one access and goes down the rows; in planes (contiguous images) it owns
// one channel, of which an access holds n numbers. `lanes` threads of a block stand side by side in
// the direction of channels, 128 bytes wide where there are as many; the others are below each
// other. Where sums are kept, as many blocks as run at once go on together, so that what they read
// lies close together at any time:
//
//     unit of thread (row, lane) in step i = (i * chunks + chunk) * rows + row
//
// Where nothing is kept, a block takes `unroll` * rows units in a piece and ends: while one waits
// for memory, others begin. (Blocks that went on waited for their loads, used them and only then
// asked for the next: 73 to 90 % of an H200's bandwidth, where Triton's tiles reach 92 to 100.)
//
// What is per channel is computed once a block and handed round in shared memory.
#pragma once

#include <algorithm>
#include <climits>
#include <optional>

#include "../common/layout.h"
#include "allocate.h"
#include "divider.h"
#include "numbers.cuh"
#include "operator.h"

namespace resnet_fused::cuda {

constexpr int kThreads = 256;

// At most so many blocks of a pass: where partial results are left to combine, 132 (an H200's
// multiprocessors) times what these kernels' registers let run at once.
constexpr int kStreamingBlocks = INT_MAX;
constexpr int kReducingBlocks = 132 * 4;

struct Pass {
  int64_t units;  // accesses of a channel
  int64_t channels;
  int64_t inner;  // numbers of a plane
  int lanes, lanes_log2;
  int slabs;  // blocks side by side
  Divider by_slabs;
  int chunks;  // blocks below each other
  int piece;   // units of a thread that lie in a piece and are all it has; 1 where it goes on

  int blocks() const { return slabs * chunks; }

  // A block's place across and down.
  DEVICE_INLINE int chunk_of(int block) const { return static_cast<int>(by_slabs(block)); }
  DEVICE_INLINE int slab_of(int block) const { return block - chunk_of(block) * slabs; }
};

inline Pass make_pass(const Extent& extent, int n, bool planes, int unroll, int blocks) {
  Pass pass{extent.outer * (planes ? extent.inner / n : 1),
            extent.channels,
            extent.inner,
            1,
            0,
            0,
            {},
            0,
            1};
  const int64_t wanted = planes ? 1 : extent.channels / n;  // lanes
  const int most = planes ? 1 : n == 1 ? 32 : 8;
  while (pass.lanes < most && pass.lanes < wanted) {
    pass.lanes *= 2;
    ++pass.lanes_log2;
  }
  const int64_t across = planes ? extent.channels : (wanted + pass.lanes - 1) / pass.lanes;
  check(across <= (int64_t(1) << 30), "input has too many channels, got ", extent.channels);
  pass.slabs = static_cast<int>(across);
  pass.by_slabs = Divider(static_cast<uint32_t>(across));
  const int64_t step = int64_t(kThreads) / pass.lanes * unroll;
  const int64_t needed = std::max<int64_t>(1, (pass.units + step - 1) / step);
  const int64_t most_chunks = std::max<int64_t>(1, blocks / across);
  pass.chunks = static_cast<int>(std::min(needed, most_chunks));
  if (needed <= most_chunks) pass.piece = unroll;
  return pass;
}

// --- on the device --------------------------------------------------------------------------

// 64-bit division is a subroutine, 32-bit division ten instructions.
DEVICE_INLINE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// A thread's channels and units, for accesses of n numbers.
template <int n, bool planes>
struct Place {
  static constexpr int own = planes ? 1 : n;  // channels of the thread

  int64_t channel;  // the first of them
  int64_t unit;     // the first
  int64_t step;     // from one to the next
  int lane, row, rows;
  bool active;  // there are such channels

  DEVICE_INLINE explicit Place(const Pass& pass) {
    lane = static_cast<int>(threadIdx.x) & (pass.lanes - 1);
    row = static_cast<int>(threadIdx.x) >> pass.lanes_log2;
    rows = kThreads >> pass.lanes_log2;
    const int slab = pass.slab_of(blockIdx.x), chunk = pass.chunk_of(blockIdx.x);
    channel = (static_cast<int64_t>(slab) * pass.lanes + lane) * own;
    active = channel < pass.channels;
    unit = static_cast<int64_t>(chunk) * pass.piece * rows + row;
    step = pass.piece > 1 ? rows : static_cast<int64_t>(pass.chunks) * rows;
  }

  // Where a unit begins.
  DEVICE_INLINE int64_t offset(const Pass& pass, int64_t unit) const {
    if constexpr (planes) {
      const int64_t across = pass.inner / n, image = quotient(unit, across);
      return (image * pass.channels + channel) * pass.inner + (unit - image * across) * n;
    } else {
      return unit * pass.channels + channel;
    }
  }
};

// The number of an access's i-th number's channel among the thread's own.
template <bool planes>
DEVICE_INLINE constexpr int channel_of(int i) {
  return planes ? 0 : i;
}

// Runs use(i, offset) for a thread's units, `unroll` of them at a time, each after load(i, offset)
// for all of them; behind the last unit load is given another one of the thread's, so that loads
// need no branches of their own. Kernels that go on for long load the next ones before they use the
// last (`ahead`): then i is below 2 * unroll, else below unroll. Of rows an offset is the one
// before and a constant.
template <int unroll, int n, bool planes, bool backwards, bool ahead, class Load, class Use,
          class Prepare>
DEVICE_INLINE void for_units(const Pass& pass, const Place<n, planes>& place, const Load& load,
                             const Prepare& prepare, const Use& use) {
  const auto offset_of = [&](int64_t unit) {
    return place.offset(pass, backwards ? pass.units - 1 - unit : unit);
  };
  int64_t unit = place.active ? place.unit : pass.units;
  int64_t offset = planes ? 0 : offset_of(unit);
  const int64_t along = (backwards ? -place.step : place.step) * pass.channels;
  // Of this round of units, or of the next.
  const auto for_each = [&](int round, const auto& body) {
#pragma unroll
    for (int i = 0; i < unroll; ++i) {
      const int k = round * unroll + i;
      const int64_t at = unit + k * place.step;
      body(i, at < pass.units, planes ? offset_of(at) : offset + k * along);
    }
  };
  const auto load_each = [&](int first, int round) {
    int64_t some = -1;
    for_each(round, [&](int i, bool there, int64_t at) {
      if (i == 0) some = there ? at : -1;
      if (some >= 0) load(first + i, there ? at : some);
    });
  };
  const auto use_each = [&](int first) {
    for_each(0, [&](int i, bool there, int64_t at) {
      if (there) use(first + i, at);
    });
  };
  const auto go_on = [&] {
    unit += unroll * place.step;
    offset += unroll * along;
  };
  constexpr int lower = 0, upper = ahead ? unroll : 0;
  load_each(lower, 0);  // under way while the channels' numbers are prepared
  prepare();
  if (pass.piece > 1) return use_each(lower);
  while (unit < pass.units) {
    if (ahead) load_each(upper, 1);
    use_each(lower);
    go_on();
    if (!ahead) load_each(lower, 0);
    if (!ahead || unit >= pass.units) continue;
    load_each(lower, 1);
    use_each(upper);
    go_on();
  }
}

// Calls value(channel, numbers) for every channel of the block; it gives `count` numbers for it,
// which all threads find afterwards at shared_memory() as [count][channels of the block].
template <class A, int count, int n, bool planes, class Value>
DEVICE_INLINE void stage_channels(const Pass& pass, const Place<n, planes>& place,
                                  const Value& value) {
  A* const shared = reinterpret_cast<A*>(shared_memory());
  const int width = pass.lanes * Place<n, planes>::own;
  const int mine = static_cast<int>(threadIdx.x);
  const int64_t channel = place.channel - place.lane * Place<n, planes>::own + mine;
  if (mine < width) {
    A numbers[count] = {};
    if (channel < pass.channels) value(channel, numbers);
#pragma unroll
    for (int i = 0; i < count; ++i) shared[i * width + mine] = numbers[i];
  }
  sync_block();
}

// The which-th of what stage_channels made of a thread's own channels.
template <class A, int n, bool planes>
DEVICE_INLINE void staged(const Pass& pass, const Place<n, planes>& place, int which,
                          A (&to)[Place<n, planes>::own]) {
  constexpr int own = Place<n, planes>::own;
  const A* const shared = reinterpret_cast<const A*>(shared_memory());
  read_shared<A, own>(shared + (which * pass.lanes + place.lane) * own, to);
}

// --- on the host ----------------------------------------------------------------------------

// Shared memory for stage_channels, of `staged` numbers a channel.
template <class A>
size_t staged_bytes(const Pass& pass, int own, int staged) {
  return sizeof(A) * static_cast<size_t>(staged * pass.lanes * own);
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

// Calls body(T(), n, planes) with the dtype's type and, as constants, how it is to be accessed.
template <class Body>
void with_access(ScalarType dtype, const Extent& extent,
                 std::initializer_list<const void*> pointers, const Body& body) {
  const bool planes = extent.inner > 1, aligned = is_aligned(pointers);
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    constexpr int n = kVector<T>;
    const bool many = n > 1 && aligned && (planes ? extent.inner : extent.channels) % n == 0;
    using Many = std::integral_constant<int, n>;
    using One = std::integral_constant<int, 1>;
    if (planes) {
      many ? body(zero, Many(), std::true_type()) : body(zero, One(), std::true_type());
    } else {
      many ? body(zero, Many(), std::false_type()) : body(zero, One(), std::false_type());
    }
  };
  switch (dtype) {
    case ScalarType::Float: return with_type(float());
    case ScalarType::Double: return with_type(double());
    case ScalarType::BFloat16: return with_type(bfloat16());
    default: return with_type(half());
  }
}

}  // namespace resnet_fused::cuda
