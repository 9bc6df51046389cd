// Sum and centred sum of squares of each channel, [pixel][channel], float16: 16-byte loads, a
// warp's rows added by shuffles, the warps' by shared memory, which is used twice.
#pragma once

#include "fault.h"

namespace resnet_fused::cuda::faults {

constexpr int kChannels = 64;  // of a block; 8 of a thread
constexpr int kWarps = 4;

struct StatisticsArguments {
  const half* x;
  float* sums;
  float* squares;
  int pixels, channels;
  int64_t pitch;  // numbers from pixel to pixel
};

// The block's total of each thread's 8 values, of the channel threadIdx.x, for the first 64
// threads.
DEVICE_INLINE float total(float (&values)[8], float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (float& value : values) {
    value += shuffle_xor(value, planted("shuffle_mask") ? 4 : 8);
    if (planted("shuffle_in_branch") && lane >= 16) continue;
    value += shuffle_xor(value, 16);
  }
  if (lane < 8) {
    for (int i = 0; i < 8; ++i) shared[warp * kChannels + lane * 8 + i] = values[i];
  }
  if (planted("divergent_barrier")) {
    if (warp != 3) sync_block();
  } else if (planted("two_barriers") && warp % 2 == 1) {
    sync_block();
  } else if (planted("barrier_threads")) {
    sync_some(1, warp == 0 ? 64 : 128);
  } else if (planted("barrier_without_a_warp")) {
    sync_some(1, 96);
  } else if (!planted("no_barrier")) {
    sync_block();
  }
  float sum = 0;
  if (threadIdx.x < kChannels) {
    for (int i = 0; i < kWarps; ++i) sum += shared[i * kChannels + threadIdx.x];
  }
  return sum;
}

__global__ void channel_statistics(StatisticsArguments a) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float* const means = shared + kWarps * kChannels;
  const int first = blockIdx.x * kChannels, own = threadIdx.x % 8 * 8, row = threadIdx.x / 8;
  const bool inside = first + own < a.channels || planted("unguarded_load");
  const auto each_pixel = [&](auto visit) {
    const int end = a.pixels + (planted("one_row_too_many") ? 1 : 0);
    for (int pixel = row; pixel < end && inside; pixel += 16) {
      const int64_t start =
          planted("int_offset") ? static_cast<int>(a.pitch) * pixel : a.pitch * pixel;
      const half* from = a.x + start + first + own;
      if (planted("misaligned_load")) ++from;
      const Bytes16 eight = load_once(from);
      for (int i = 0; i < 8; ++i) {
        const Pair pair = unpair(eight.words[i / 2], half());
        visit(i, i % 2 == 0 ? pair.first : pair.second);
      }
    }
  };
  const int channel = first + static_cast<int>(threadIdx.x);
  const bool writes =
      threadIdx.x < kChannels && (channel < a.channels || planted("unguarded_store"));

  float values[8] = {};
  each_pixel([&](int i, float x) { values[i] += x; });
  const float sum = total(values, shared);
  if (writes) a.sums[channel] = sum;
  if (threadIdx.x < kChannels) means[threadIdx.x] = sum / static_cast<float>(a.pixels);
  if (!planted("no_barrier_between_passes")) sync_block();

  float mean[8];
  for (int i = 0; i < 8; ++i) mean[i] = means[own + i];
  if (planted("index_of_registers")) mean[0] = mean[static_cast<int>(a.pixels % 8) + 8];
  for (float& value : values) value = 0;
  each_pixel([&](int i, float x) { values[i] += (x - mean[i]) * (x - mean[i]); });
  const float squares = total(values, shared);
  if (writes) a.squares[channel] = squares;
}

inline const char* run(const StatisticsArguments& a) {
  size_t bytes = (kWarps + 1) * kChannels * sizeof(float);
  if (planted("short_shared")) bytes -= sizeof(float);
  return launch(channel_statistics, dim3((a.channels + kChannels - 1) / kChannels),
                dim3(kWarps * 32), bytes, Stream(), a);
}

}  // namespace resnet_fused::cuda::faults
