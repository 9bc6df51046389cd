// A convolution's weight (K, C / groups, R, S), of any strides, in the order in which the kernels
// of conv_bn_act.cu read it:
//
//     [column tile][chunk][tap][8 planes][column][16 bytes of input channels]
//
// with zeros beyond channels and outputs, and where outputs of several narrow groups share a tile.
// Columns are interleaved as conv_epilogue.cuh wants them; float32 is rounded to TF32. A chunk is
// 128 bytes of channels of one output.
//
// A block takes a chunk of 32 columns: a warp is a plane, a lane a column, and each writes 16 bytes
// a tap. So in channels_last a block reads whole lines. In a contiguous weight the chunk of an
// output is one run of R * S taps a channel, of which each tap reads every R * S'th number, from L1
// after the first. The weight is read once and written once; PyTorch needs some eight launches.

#include <algorithm>
#include <cstring>

#include "allocate.h"
#include "numbers.cuh"
#include "operator.h"
#include "pack_weights.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* op = "_cuda_pack";
constexpr int kPlanes = 8;
constexpr int kStrip = 32;  // columns of a block
constexpr int kThreads = kPlanes * kStrip;

template <class T>
struct PackArguments {
  const T* weight;
  T* packed;
  int64_t by_output, by_channel, by_row, by_column;  // from one to the next, in numbers
  int outputs, channels;                             // of all groups, of one
  int group_outputs, together;                       // groups that share a tile
  int taps, width;
  int columns, chunks;
};

// Number 8 i + 2 q + e of 32 columns is output 8 q + 2 i + e.
DEVICE_INLINE int output_of(int column) {
  return column % 8 / 2 * 8 + column / 8 * 2 + column % 2;
}

// n numbers are read at once.
template <class T, int n>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackArguments<T> a) {
  constexpr int kPiece = kVector<T>;
  const int lane = threadIdx.x % kStrip, plane = threadIdx.x / kStrip;
  const int chunk = blockIdx.x % a.chunks, first_column = blockIdx.x / a.chunks * kStrip;
  const int output = first_column + output_of(lane);
  const int group = output / a.group_outputs % a.together;  // of those that share the tile
  const int first = (chunk * kPlanes + plane) * kPiece - group * a.channels;
  const T* const from = a.weight + (output * a.by_output + first * a.by_channel);
  const int64_t block = int64_t{first_column / a.columns} * a.chunks + chunk;
  const int column = first_column % a.columns + lane;
  for (int tap = blockIdx.y; tap < a.taps; tap += gridDim.y) {
    const T* const at = from + (tap / a.width * a.by_row + tap % a.width * a.by_column);
    T numbers[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; ++i) numbers[i] = narrowed<T>(0);
#pragma unroll
    for (int i = 0; i < kPiece; i += n) {
      if (output < a.outputs && first + i >= 0 && first + i < a.channels) {
        const Raw<T, n> raw = load<T, n>(at + i * a.by_channel);
        std::memcpy(numbers + i, &raw, sizeof(raw));
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kPiece; ++i) numbers[i] = round_tf32(numbers[i]);
    }
    Bytes16 bytes;
    std::memcpy(&bytes, numbers, sizeof(bytes));
    store_16(a.packed + (((block * a.taps + tap) * kPlanes + plane) * a.columns + column) * kPiece,
             bytes);
  }
}

// Whether every 16 bytes of channels are aligned, and belong to one group.
template <class T>
bool comes_in_vectors(const PackArguments<T>& a) {
  constexpr int n = kVector<T>;
  const auto fits = [](int64_t numbers) { return numbers % n == 0; };
  return a.by_channel == 1 && fits(a.channels) && fits(a.by_output) &&
         (a.taps == a.width || fits(a.by_row)) && (a.width == 1 || fits(a.by_column)) &&
         reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
}

template <class T>
void run(const Tensor& weight, const Tensor& packed, PackArguments<T> a, bool turned) {
  const auto strides = weight.strides();
  a.weight = static_cast<const T*>(weight.const_data_ptr());
  a.packed = static_cast<T*>(packed.mutable_data_ptr());
  a.by_output = strides[0], a.by_channel = strides[1];
  a.by_row = strides[2], a.by_column = strides[3];
  if (turned) {
    a.weight += (a.taps / a.width - 1) * a.by_row + (a.width - 1) * a.by_column;
    std::swap(a.by_output, a.by_channel);
    a.by_row = -a.by_row, a.by_column = -a.by_column;
  }
  const OnDeviceOf device(weight);
  const int64_t blocks = packed.size(0) * (a.columns / kStrip) * a.chunks;
  // Few blocks leave taps to others: two for each multiprocessor, if there are so many taps.
  const int64_t parts = std::clamp<int64_t>(2 * multiprocessors() / blocks, 1, a.taps);
  device.launch(op, comes_in_vectors(a) ? pack_kernel<T, kVector<T>> : pack_kernel<T, 1>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(parts)), dim3(kThreads),
                0, a);
}

void check_arguments(const Tensor& weight, int64_t groups, int64_t columns, bool turned) {
  check(is_here(weight) && weight.dim() == 4, op,
        ": weight must have 4 dimensions (K, C / groups, R, S) on ", kDeviceName, ", got shape ",
        shape_text(weight.sizes()));
  const ScalarType dtype = weight.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float,
        op, ": weight must be float16, bfloat16 or float32, got ", dtype_name(dtype));
  check(weight.numel() > 0, op, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check_memory(op, "weight", weight);
  check(columns % kStrip == 0 && columns >= 32 && columns <= 256, op,
        ": columns must be a multiple of 32 from 32 to 256, got ", columns);
  check(groups > 0 && weight.size(0) % groups == 0, op,
        ": outputs must be a multiple of groups, got ", weight.size(0), " and ", groups);
  check(groups == 1 || !turned, op, ": groups must be 1 where the weight is turned, got ", groups);
  constexpr int64_t most = int64_t{1} << 24;
  check(weight.numel() < most * 128 && weight.size(0) < most && weight.size(1) * groups < most, op,
        ": weight is too large, shape ", shape_text(weight.sizes()));
}

}  // namespace

Tensor pack_weights(const Tensor& weight, int64_t groups, int64_t columns, bool turned) {
  check_arguments(weight, groups, columns, turned);
  const auto size = [&](int d) { return static_cast<int>(weight.size(d)); };
  const auto up = [](int64_t n, int64_t by) { return static_cast<int>((n + by - 1) / by); };
  const int outputs = size(turned ? 1 : 0), channels = size(turned ? 0 : 1);
  const int taps = size(2) * size(3), group_outputs = outputs / static_cast<int>(groups);
  const int together =
      groups_together(static_cast<int>(groups), group_outputs, static_cast<int>(columns));
  check(together > 0, op, ": groups must fill tiles of ", columns, " outputs, got ", groups,
        " groups of ", group_outputs);
  const int piece = 16 / static_cast<int>(weight.element_size());
  const int chunks = up(int64_t{together} * channels, kPlanes * piece);
  const int64_t sizes[] = {up(outputs, columns), chunks, taps, kPlanes, columns, piece};
  const Tensor packed = empty({sizes, 6}, MemoryFormat::Contiguous, weight.scalar_type(), weight);
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    run<T>(weight, packed,
           {nullptr, nullptr, 0, 0, 0, 0, outputs, channels, group_outputs, together, taps, size(3),
            static_cast<int>(columns), chunks},
           turned);
  };
  switch (weight.scalar_type()) {
    case ScalarType::Half: run_as(half()); break;
    case ScalarType::BFloat16: run_as(bfloat16()); break;
    default: run_as(float());
  }
  return packed;
}

}  // namespace resnet_fused::cuda

RESNET_FUSED_OPERATORS(m) {
  m.impl("_cuda_pack", TORCH_BOX(&resnet_fused::cuda::pack_weights));
}
