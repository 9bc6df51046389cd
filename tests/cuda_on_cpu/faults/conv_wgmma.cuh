// 3x3 convolution of one image by bulk copies, mbarriers and wgmma. The image comes as planes of 8
// channels with a border of zeros, [channel / 8][y][x][8], so that a row of the 10x10 halo tile is
// one copy; weights are [channel / 16][tap][2][output][8]. One warp loads, into a ring of two
// slots: rows by bulk copies, weights by cp.async. A warpgroup multiplies: 64 pixels by 64 outputs,
// the nine taps by nine starts in the same tile.
#pragma once

#include "fault.h"

namespace resnet_fused::cuda::faults {

struct PlaneArguments {
  const half* x;
  const half* w;
  float* y;                     // [y][x][64]
  int height, width, channels;  // multiples of 8, 8 and 16
};

constexpr int kPlaneBytes = 10 * 10 * 16 + 16;  // with room in which nobody writes
constexpr int kColumns = 64;
constexpr int kTapBytes = 2 * kColumns * 16, kWeights = 9 * kTapBytes;
constexpr int kSlotBytes = 2 * kPlaneBytes + kWeights, kSlots = 2, kFront = 128;

struct ConvWgmma {
  const PlaneArguments& a;
  int y0, x0;
  int thread;

  DEVICE_INLINE Mbarrier* full(int slot) const {
    return reinterpret_cast<Mbarrier*>(shared_memory()) + slot;
  }
  DEVICE_INLINE Mbarrier* empty(int slot) const { return full(kSlots + slot); }
  DEVICE_INLINE unsigned char* planes(int slot) const {
    return shared_memory() + kFront + slot * kSlotBytes;
  }
  DEVICE_INLINE unsigned char* weights(int slot) const { return planes(slot) + 2 * kPlaneBytes; }

  DEVICE_INLINE void init() const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kSlots; ++i) {
        mbarrier_init(full(i), planted("count_of_full") ? 31 : 32);
        mbarrier_init(empty(i), planted("count_of_empty") ? 5 : 4);
      }
      if (!planted("no_init_done")) mbarrier_init_done();
      if (planted("copy_over_stores")) *planes(0) = 0;
    }
    if (!planted("no_barrier_after_init")) sync_block();
  }

  DEVICE_INLINE void load_weights(int slot, int step) const {
    const half* const from = a.w + int64_t{step} * kWeights / 2;
    for (int i = thread; i < kWeights / 16; i += 32) {
      unsigned char* const to = weights(slot) + i * 16;
      if (planted("stores_without_fence")) {
        *reinterpret_cast<Bytes16*>(to) = load_once(from + i * 8);
      } else {
        cp_async_16(to, from + i * 8, true);
      }
    }
    cp_async_commit();
    if (planted("fence_before_wait")) fence_async();
    if (!planted("no_wait_for_weights")) cp_async_wait<0>();
    const bool fences = !planted("no_fence_async") && !planted("fence_before_wait") &&
                        !planted("stores_without_fence");
    if (fences) fence_async();
  }

  DEVICE_INLINE void load_planes(int slot, int step) const {
    int bytes = 2 * 10 * 10 * 16;
    if (planted("too_few_bytes")) bytes -= 16;
    if (planted("too_many_bytes")) bytes += 16;
    mbarrier_arrive_expect(full(slot), bytes);
    for (int i = 0; i < 20; ++i) {
      const int plane = i / 10, row = i % 10;
      const half* from =
          a.x + ((int64_t{2 * step + plane} * (a.height + 2) + y0 + row) * (a.width + 2) + x0) * 8;
      if (planted("misaligned_bulk")) from += 4;
      const int odd = planted("bulk_size") ? 8 : 0;
      const int further = planted("bulk_past_the_slot") ? kSlotBytes : 0;
      bulk_copy(planes(slot) + plane * kPlaneBytes + row * 160 + further, from, 160 - odd,
                full(slot));
    }
    if (planted("double_arrival")) mbarrier_arrive(full(slot));
  }

  DEVICE_INLINE void load() const {
    for (int step = 0; step < a.channels / 16; ++step) {
      const int slot = step % kSlots, round = step / kSlots;
      if (!planted("no_wait_for_empty")) mbarrier_wait(empty(slot), round % 2 ^ 1);
      load_weights(slot, step);
      if (thread == 0) {
        load_planes(slot, step);
      } else {
        mbarrier_arrive(full(slot));
      }
    }
  }

  DEVICE_INLINE void multiply() const {
    float acc[kColumns / 2];
    for (int step = 0; step < a.channels / 16; ++step) {
      const int slot = step % kSlots, round = step / kSlots;
      const int parity = round % 2 ^ (planted("wrong_parity") ? 1 : 0);
      if (!planted("no_wait_for_full")) mbarrier_wait(full(slot), parity);
      if (!planted("no_wgmma_fence")) wgmma_fence();
      const uint64_t w = matrix(weights(slot), kColumns * 16, 128);
      for (int tap = 0; tap < 9; ++tap) {
        const int shift = tap / 3 * 10 + (planted("tap_shift") ? 2 - tap % 3 : tap % 3);
        const int along_rows = planted("row_stride") ? 128 : 160;
        const int along_k = planted("plane_stride") ? kPlaneBytes - 16 : kPlaneBytes;
        const uint64_t x = matrix(planes(slot) + shift * 16, along_k, along_rows);
        if (planted("three_warps_only") && thread >= 96) continue;
        wgmma(acc, x, matrix_at(w, tap * kTapBytes), step > 0 || tap > 0, half());
      }
      if (!planted("no_wgmma_commit")) wgmma_commit();
      if (planted("early_release") && thread % 32 == 0) mbarrier_arrive(empty(slot));
      if (!planted("no_wgmma_wait")) wgmma_wait<0>();
      if (!planted("early_release") && thread % 32 == 0) mbarrier_arrive(empty(slot));
    }
    wgmma_hold(acc);
    const int row = thread / 32 * 16 + thread % 32 / 4;
    for (int i = 0; i < kColumns / 2; ++i) {
      const int pixel = row + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      const int y = y0 + pixel / 8, x = x0 + pixel % 8;
      a.y[(int64_t{y} * a.width + x) * kColumns + column] = acc[i];
    }
  }
};

__global__ void conv_wgmma(PlaneArguments a) {
  const int across = a.width / 8, tile = blockIdx.x;
  const ConvWgmma conv{a, tile / across * 8, tile % across * 8,
                       static_cast<int>(threadIdx.x % 128)};
  conv.init();
  if (threadIdx.x < 128) {
    take_registers<160>();
    conv.multiply();
  } else if (threadIdx.x < 160) {
    give_registers<40>();
    conv.load();
  }
}

inline const char* run_wgmma(const PlaneArguments& a) {
  return launch(conv_wgmma, dim3(a.height / 8 * (a.width / 8)), dim3(160),
                kFront + kSlots * kSlotBytes, Stream(), a);
}

}  // namespace resnet_fused::cuda::faults
