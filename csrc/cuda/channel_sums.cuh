// Sums over a tensor, two for each channel.
//
// A thread adds up its own units in the precision of the arithmetic. From there on it is float64:
// the threads of a block in shared memory, in the order of a tree, then blocks, whose sums a second
// kernel adds. There are few by then, and what a whole channel is shifted by costs no more than the
// last rounding. Fixed orders and no atomics: the same bits every time. A second launch costs a GPU
// some two microseconds; a counter that let the last block do it would have to be zeroed by one
// too.
#pragma once

#include "channel_pass.cuh"

namespace resnet_fused::cuda {

// Adds up rows of `width` numbers, whose number is a power of two; the sums are in the first row.
DEVICE_INLINE void sum_rows(double* shared, int rows, int width) {
  const int threads = static_cast<int>(blockDim.x);
  for (int half = rows / 2; half > 0; half /= 2) {
    sync_block();
    for (int i = static_cast<int>(threadIdx.x); i < half * width; i += threads)
      shared[i] += shared[i + half * width];
  }
  sync_block();
}

// The block's sums, from those of its threads, into `partial`: [2][chunks][channels].
template <class A, int n, bool planes>
DEVICE_INLINE void write_sums(const Pass& pass, const Place<n, planes>& place,
                              const A (&first)[Place<n, planes>::own],
                              const A (&second)[Place<n, planes>::own], double* partial) {
  constexpr int own = Place<n, planes>::own;
  double* const shared = reinterpret_cast<double*>(shared_memory());
  const int width = pass.lanes * own;
  double* const mine = shared + place.row * 2 * width + place.lane * own;
  sync_block();  // what was staged has been read
#pragma unroll
  for (int j = 0; j < own; ++j) {
    mine[j] = first[j];
    mine[width + j] = second[j];
  }
  sum_rows(shared, place.rows, 2 * width);
  const int i = static_cast<int>(threadIdx.x);
  if (i >= 2 * width) return;
  const int slab = pass.slab_of(blockIdx.x);
  const int64_t chunk = pass.chunk_of(blockIdx.x);
  const int64_t channel = static_cast<int64_t>(slab) * width + i % width;
  if (channel < pass.channels)
    partial[((i / width) * int64_t(pass.chunks) + chunk) * pass.channels + channel] = shared[i];
}

constexpr int kCombinedLanes = 8;  // channels that a block combines

// The channel that a thread combines, which may not exist.
DEVICE_INLINE int64_t combined_channel() {
  return static_cast<int64_t>(blockIdx.x) * kCombinedLanes + threadIdx.x % kCombinedLanes;
}

// Two sums for that channel over all chunks, each of which part(chunk, first, second) adds to them;
// true in the one thread that has them.
template <class Part>
DEVICE_INLINE bool combine_parts(int chunks, int64_t channels, const Part& part, double& first,
                                 double& second) {
  double* const shared = reinterpret_cast<double*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kCombinedLanes;
  const int row = static_cast<int>(threadIdx.x) / kCombinedLanes;
  const int rows = static_cast<int>(blockDim.x) / kCombinedLanes;
  const bool active = combined_channel() < channels;
  first = second = 0;
  if (active) {
#pragma unroll 4
    for (int chunk = row; chunk < chunks; chunk += rows) part(chunk, first, second);
  }
  shared[row * 2 * kCombinedLanes + lane] = first;
  shared[row * 2 * kCombinedLanes + kCombinedLanes + lane] = second;
  sum_rows(shared, rows, 2 * kCombinedLanes);
  first = shared[lane];
  second = shared[kCombinedLanes + lane];
  return row == 0 && active;
}

// The same of what write_sums wrote.
DEVICE_INLINE bool combine_sums(const double* partial, int chunks, int64_t channels, double& first,
                                double& second) {
  const double* const mine = partial + combined_channel();
  const double* const other = mine + chunks * channels;
  const auto part = [&](int chunk, double& a, double& b) {
    a += mine[chunk * channels];
    b += other[chunk * channels];
  };
  return combine_parts(chunks, channels, part, first, second);
}

// --- on the host ----------------------------------------------------------------------------

// Where the blocks of a pass leave their sums.
class PartialSums {
 public:
  PartialSums(int chunks, int64_t channels, const Tensor& like)
      : chunks_(chunks),
        channels_(channels),
        tensor_(empty_vector(2 * chunks * channels, ScalarType::Double, like)) {}
  PartialSums(const Pass& pass, const Tensor& like)
      : PartialSums(pass.chunks, pass.channels, like) {}

  double* data() const { return static_cast<double*>(tensor_.mutable_data_ptr()); }

  // Starts kernel(sums, chunks, channels, arguments...), which calls combine_sums.
  template <class... Parameters, class... Arguments>
  void launch(const OnDeviceOf& device, const char* op, void (*kernel)(Parameters...),
              Arguments... arguments) const {
    int rows = 1;
    while (rows < chunks_ && rows < 64) rows *= 2;
    const int64_t blocks = (channels_ + kCombinedLanes - 1) / kCombinedLanes;
    device.launch(op, kernel, dim3(static_cast<unsigned>(blocks)), dim3(rows * kCombinedLanes),
                  sizeof(double) * 2 * rows * kCombinedLanes, static_cast<const double*>(data()),
                  chunks_, channels_, arguments...);
  }

  // Shared memory for write_sums of threads with so many channels; it takes the place of what was
  // staged.
  static size_t bytes(int own) { return sizeof(double) * static_cast<size_t>(2 * kThreads * own); }

 private:
  int chunks_;
  int64_t channels_;
  Tensor tensor_;
};

}  // namespace resnet_fused::cuda
