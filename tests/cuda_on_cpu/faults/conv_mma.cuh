// 3x3 convolution of one image, [y][x][channel], bfloat16, padding 1, by cp.async, ldmatrix and
// mma.sync. A block makes 8x8 pixels of 16 outputs from a halo tile of 10x10 pixels, 16 channels at
// a time; the next 16 come while these are multiplied. Weights are [tap][output][channel].
#pragma once

#include "fault.h"

namespace resnet_fused::cuda::faults {

struct ConvArguments {
  const bfloat16* x;
  const bfloat16* w;
  bfloat16* y;
  int height, width, channels;  // 16 outputs
};

constexpr int kTile = 8, kHalo = 10, kOutputs = 16, kTaps = 9;
constexpr int kPitch = 48;  // bytes of 16 numbers, and 16 more: rows in different banks
constexpr int kPixelBytes = kHalo * kHalo * kPitch, kWeightBytes = kTaps * kOutputs * kPitch;
constexpr int kStageBytes = kPixelBytes + kWeightBytes;

struct ConvMma {
  const ConvArguments& a;
  int y0, x0;  // of the block's pixels
  int lane, warp;

  // 16 channels of the tile and of the weights.
  DEVICE_INLINE void load(unsigned char* to, int channel) const {
    const int edge = planted("halo_off_by_one") ? 0 : 1;
    const int rows = planted("halo_too_small") ? kHalo - 1 : kHalo;
    for (int i = threadIdx.x; i < rows * kHalo * 2; i += blockDim.x) {
      const int pixel = i / 2, part = i % 2;
      const int y = y0 + pixel / kHalo - edge, x = x0 + pixel % kHalo - edge;
      bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
      if (planted("edge_of_the_image")) inside = y >= 0 && y <= a.height && x >= 0 && x < a.width;
      const bfloat16* from = a.x + ((int64_t{y} * a.width + x) * a.channels + channel + part * 8);
      if (!inside) from = a.x;
      unsigned char* place = to + pixel * kPitch + part * 16;
      if (planted("misaligned_copy")) place += 8;
      if (planted("misaligned_source")) from += 4;
      cp_async_16(place, from, planted("no_zeros") || inside);
    }
    to += kPixelBytes;
    for (int i = threadIdx.x; i < kTaps * kOutputs * 2; i += blockDim.x) {
      const int row = i / 2, part = i % 2;
      cp_async_16(to + row * kPitch + part * 16,
                  a.w + (int64_t{row} * a.channels + channel + part * 8), true);
    }
    if (!planted("no_commit")) cp_async_commit();
  }

  DEVICE_INLINE void multiply(const unsigned char* from, float (&acc)[2][4]) const {
    const unsigned char* const weights = from + kPixelBytes;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int pixel = lane % 16;
      const int y = warp * 2 + pixel / 8 + tap / 3, x = pixel % 8 + tap % 3;
      uint32_t left[4], right[4];
      ldmatrix_x4(left, from + (y * kHalo + x) * kPitch + lane / 16 * 16);
      const int output = lane / 16 * 8 + lane % 8;
      ldmatrix_x4(right, weights + (tap * kOutputs + output) * kPitch + lane / 8 % 2 * 16);
      for (int n = 0; n < 2; ++n) {
        const bool swapped = planted("fragment_index");
        const uint32_t b[2] = {right[2 * n + (swapped ? 1 : 0)], right[2 * n + (swapped ? 0 : 1)]};
        mma_16816(acc[n], left, b, bfloat16());
      }
    }
  }

  // A warp's 16 pixels by way of its own shared memory, 16 bytes a lane.
  DEVICE_INLINE void store(unsigned char* own, const float (&acc)[2][4]) const {
    for (int n = 0; n < 2; ++n) {
      for (int j = 0; j < 2; ++j) {
        const int pixel = lane / 4 + 8 * j, output = n * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(own + pixel * kPitch + output * 2) =
            pair(acc[n][2 * j], acc[n][2 * j + 1], bfloat16());
      }
    }
    if (!planted("no_sync_warp")) sync_warp();
    const int pixel = lane / 2, y = y0 + warp * 2 + pixel / 8, x = x0 + pixel % 8;
    const bool inside = y < a.height && x < a.width;
    if (!inside && !(planted("unguarded_tile") && x < a.width)) return;
    bfloat16* to = a.y + (int64_t{y} * a.width + x) * kOutputs + lane % 2 * 8;
    if (planted("misaligned_store")) to += 2;
    *reinterpret_cast<Bytes16*>(to) =
        *reinterpret_cast<const Bytes16*>(own + pixel * kPitch + lane % 2 * 16);
  }
};

__global__ void conv_mma(ConvArguments a) {
  unsigned char* const stages = shared_memory();
  const int across = (a.width + kTile - 1) / kTile;
  const int tile = blockIdx.x;
  const ConvMma conv{a, tile / across * kTile, tile % across * kTile,
                     static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x / 32)};
  float acc[2][4] = {};
  const int steps = a.channels / 16;
  conv.load(stages, 0);
  for (int i = 0; i < steps; ++i) {
    if (i + 1 < steps) {
      const int next = planted("one_stage_only") ? 0 : (i + 1) % 2;
      conv.load(stages + next * kStageBytes, (i + 1) * 16);
      if (planted("one_group_too_few")) {
        cp_async_wait<2>();
      } else {
        cp_async_wait<1>();
      }
    } else if (!planted("no_last_wait")) {
      cp_async_wait<0>();
    }
    if (!planted("no_barrier_after_wait")) sync_block();
    conv.multiply(stages + i % 2 * kStageBytes, acc);
    if (!planted("no_barrier_before_load")) sync_block();  // the next load but one comes here
  }
  conv.store(stages + conv.warp * 16 * kPitch, acc);
}

inline const char* run_mma(const ConvArguments& a) {
  const int tiles = (a.height + kTile - 1) / kTile * ((a.width + kTile - 1) / kTile);
  const int less = planted("stage_too_small") ? kPitch : 0;
  return launch(conv_mma, dim3(tiles), dim3(128), 2 * kStageBytes - less, Stream(), a);
}

}  // namespace resnet_fused::cuda::faults
