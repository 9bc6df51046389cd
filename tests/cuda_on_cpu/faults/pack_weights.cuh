// A convolution's weight [output][channel][tap], bfloat16, in groups that share a tile, packed as
// [tap][8 planes][column][8 channels]: a warp is a plane, a lane a column of 32, and taps are
// shared out among blocks.
#pragma once

#include "fault.h"

namespace resnet_fused::cuda::faults {

struct PackArguments {
  const bfloat16* weight;
  bfloat16* packed;
  int outputs, channels;  // of all groups, of one
  int groups, taps, columns;
};

__global__ void pack_weights(PackArguments a) {
  const int lane = threadIdx.x % 32, plane = threadIdx.x / 32;
  const int in_strip = planted("column_order") ? lane % 8 / 2 * 8 + lane % 2 * 4 + lane / 8
                                               : lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
  const int output = static_cast<int>(blockIdx.x) * 32 + in_strip;
  const int group = planted("first_group_only") ? 0 : output / (a.outputs / a.groups);
  const int first = plane * 8 - group * a.channels;
  const int end = a.channels + (planted("unguarded_channels") ? 8 : 0);
  const bool there = output < a.outputs || planted("unguarded_outputs");
  for (int tap = blockIdx.y; tap < a.taps; tap += gridDim.y + (planted("taps_left_out") ? 1 : 0)) {
    bfloat16 numbers[8];
    for (int i = 0; i < 8; ++i) {
      numbers[i] = rounded<bfloat16>(0);
      if (there && first + i >= 0 && first + i < end)
        numbers[i] = a.weight[(output * a.channels + first + i) * a.taps + tap];
    }
    Bytes16 bytes;
    std::memcpy(&bytes, numbers, sizeof(bytes));
    const int column = static_cast<int>(blockIdx.x) * 32 + lane;
    store_16(a.packed + ((tap * 8 + plane) * a.columns + column) * 8, bytes);
  }
}

inline const char* run_pack(const PackArguments& a) {
  return launch(pack_weights, dim3(a.columns / 32, 2), dim3(256), 0, Stream(), a);
}

}  // namespace resnet_fused::cuda::faults
