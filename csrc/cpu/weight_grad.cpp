// The gradient of a convolution's weights as matrix products over pixels, or over Winograd's tiles:
//
//     dw[k][c][tap] = sum_pixels dy[pixel][k] x[pixel * stride + tap][c]
//     dw = G^T (sum_tiles (A dy A^T)[k] (.) (B^T x B)[c]) G           3 x 3, F(4 x 4), stride 1 or
//     2
//
// The second form has 36 products for a tile's 144. Its tiles are those of the forward convolution,
// smaller ones at the image's edge (winograd_transform.h).
//
// Blocks of tiles or pixels are prepared: transformed, or copied, to [16 channels][row][16], so
// that the products run over memory in order. Where L2 holds the whole gradient beside a block,
// each thread has both to itself, and the threads' gradients are added up in the end. Otherwise
// blocks are prepared by all, and then each thread adds them up for its share of the gradient, 64
// k's x 32 c's at a time, at the price of their way through L3. All sums have one order, so results
// repeat bit for bit with the same number of threads. Lavin, Gray: "Fast Algorithms for
// Convolutional Neural Networks", arXiv:1509.09308.

#include "weight_grad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

#include "isa.h"
#include "parallel.h"

#define KERNEL_HEADER "weight_grad_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kPreparedFloats = int64_t(3) << 18;  // 3 MiB, a tenth of L3
constexpr int64_t kCacheFloats = int64_t(225) << 10;   // 900 KiB of an L2 of 1 MiB
constexpr int64_t kLeastRows = 16;                     // of a block that L2 holds beside the sums
constexpr int64_t kMostSums = int64_t(4) << 20;        // floats, of all threads
constexpr int64_t kBlockPixels = 128;                  // of which 32 channels fill half of L1
constexpr int64_t kMostChunks = 4;                     // of 16 k's in a unit
constexpr int64_t kLeastJoined = 16;                   // channels; of fewer the taps are joined

int64_t chunks16(int64_t channels) {
  return (channels + 15) / 16;
}
// An odd number of cache lines, so that the same row of all chunks does not meet in one set.
int64_t chunk_stride(int64_t rows) {
  return (rows | 1) * 16;
}
int64_t tiles_of(const ConvShape& s) {
  return WinogradTiles{s.out_height, 4}.count() * WinogradTiles{s.out_width, 4}.count();
}

}  // namespace

WeightGrad::WeightGrad(const ConvShape& shape, bool winograd, bool is_bf16, int64_t most_images)
    : task_{shape, nullptr, nullptr, is_bf16, winograd, 36, shape.channels, nullptr, nullptr} {
  const int64_t taps = shape.kernel[0] * shape.kernel[1];
  if (!winograd) {
    const bool joins =
        shape.channels < kLeastJoined && taps > 1 && taps * shape.channels <= kMostJoined;
    task_.matrices = joins ? 1 : taps;
    task_.columns = joins ? taps * shape.channels : shape.channels;
  }
  rows_of_image_ = winograd ? tiles_of(shape) : shape.out_height * shape.out_width;
  const int64_t a = task_.row_chunks(), b = chunks16(task_.columns);
  // With stride 2 the odd inputs' matrices have up to 16 rows for a tile.
  const int64_t entries = winograd ? (shape.stride[0] == 2 ? 81 : 36) : 1;
  const int64_t chunks = winograd ? entries * (a + b) : a + task_.matrices * b;
  // What chunk_stride adds to each matrix, at most.
  const int64_t spare = winograd ? task_.matrices * (a + b) : chunks;
  const int64_t threads = torch::stable::get_num_threads();

  // As large as possible, if it leaves no thread idle for more than a tenth of the time.
  for (chunks_ = kMostChunks; chunks_ > 1; chunks_ /= 2) {
    if (10 * units() >= 9 * ((units() + threads - 1) / threads * threads)) break;
  }
  const int64_t all = units() * unit_floats();
  const int64_t beside = ((kCacheFloats - all) / 16 - spare) / chunks;  // rows
  const int64_t rows = std::min(shape.batch, most_images) * rows_of_image_;
  const bool owns = beside >= kLeastRows && threads * all <= kMostSums;
  workers_ = owns ? std::clamp<int64_t>(rows / kLeastRows, 1, threads) : 0;
  block_rows_ = winograd ? kWinogradLargestBlock : kBlockPixels;
  if (owns) block_rows_ = std::min(block_rows_, beside);
  block_floats_ = (chunks * block_rows_ + spare) * 16;
  const int64_t needed = (rows + block_rows_ - 1) / block_rows_;
  blocks_ = owns ? workers_ : std::clamp<int64_t>(kPreparedFloats / block_floats_, 1, needed);
  keeps_ = blocks_ < needed || most_images < shape.batch;

  const int64_t sets = owns ? workers_ * units() : keeps_ ? units() : std::min(threads, units());
  const int64_t zeros = (std::max(shape.channels, shape.out_channels) + 15) / 16 * 16;
  prepared_ = Workspace(static_cast<size_t>(blocks_ * block_floats_ + zeros));
  sums_ = Workspace(static_cast<size_t>(sets * unit_floats()));
  task_.workspace = prepared_.data();
  task_.zeros = prepared_.data() + blocks_ * block_floats_;
  std::fill_n(prepared_.data() + blocks_ * block_floats_, zeros, 0.0f);
}

GradUnit WeightGrad::unit(int64_t index, bool adds, float* sums) const {
  const int64_t chunk = index % row_chunk_units() * chunks_;
  return {chunk, std::min(chunks_, task_.row_chunks() - chunk), index / row_chunk_units(), adds,
          sums};
}

// Where the matrices of rows [first, first + count) lie, from `at` on.
void WeightGrad::lay_out(int64_t first, int64_t count, int64_t at, GradMatrix* matrices) const {
  std::array<int64_t, kWinogradMostWeights> tile_rows{};
  if (task_.winograd) {
    RESNET_FUSED_CALL(count_tile_rows, task_.shape, first, count, tile_rows.data());
  }
  const int64_t a = task_.row_chunks(), b = chunks16(task_.columns);
  for (int64_t m = 0; m < task_.matrices; ++m) {
    const int64_t rows = task_.winograd ? tile_rows[m] : count;
    const int64_t stride = chunk_stride(rows);
    const bool has_own_a = task_.winograd || m == 0;
    matrices[m] = {has_own_a ? at : matrices[0].a, at + (has_own_a ? a * stride : 0), rows, stride,
                   stride};
    at = matrices[m].b + b * stride;
  }
}

void WeightGrad::add(const void* input, const void* grad, int64_t images, bool is_last,
                     const WeightView& to) {
  task_.input = input, task_.grad = grad, task_.shape.batch = images;
  if (workers_ == 0) return add_shared(images * rows_of_image_, is_last, to);
  add_private(images * rows_of_image_);
  if (is_last) reduce(to);
}

void WeightGrad::add_private(int64_t rows) {
  const GradPrepareKernel prepare = RESNET_FUSED_CALL(grad_prepare_kernel, task_);
  const GradMultiplyKernel kernel = RESNET_FUSED_CALL(grad_multiply_kernel);
  parallel_for(0, workers_, 1, [&](int64_t begin, int64_t end) {
    std::vector<GradMatrix> matrices(static_cast<size_t>(task_.matrices));
    for (int64_t worker = begin; worker < end; ++worker) {
      float* const sums = sums_.data() + worker * units() * unit_floats();
      const int64_t last = rows * (worker + 1) / workers_;
      bool adds = adds_;
      for (int64_t first = rows * worker / workers_; first < last; first += block_rows_) {
        const int64_t count = std::min(block_rows_, last - first);
        lay_out(first, count, worker * block_floats_, matrices.data());
        const std::vector<WeightGradBlock> block{{first, count, matrices.data()}};
        prepare(task_, block[0], 0, count);
        for (int64_t i = 0; i < units(); ++i) {
          kernel(task_, block, unit(i, adds, sums + i * unit_floats()));
        }
        adds = true;
      }
      if (!adds) std::fill_n(sums, units() * unit_floats(), 0.0f);
    }
  });
  adds_ = true;
}

void WeightGrad::reduce(const WeightView& to) {
  const GradStoreKernel store = RESNET_FUSED_CALL(grad_store_kernel, task_);
  parallel_for(0, units(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const sums = sums_.data() + i * unit_floats();
      for (int64_t worker = 1; worker < workers_; ++worker) {
        const float* const others = sums + worker * units() * unit_floats();
        for (int64_t n = 0; n < unit_floats(); ++n) sums[n] += others[n];
      }
      if (!store(task_, unit(i, true, sums), to)) is_finite_ = false;
    }
  });
}

void WeightGrad::add_shared(int64_t rows, bool is_last, const WeightView& to) {
  const GradPrepareKernel prepare = RESNET_FUSED_CALL(grad_prepare_kernel, task_);
  std::vector<GradMatrix> matrices(static_cast<size_t>(blocks_ * task_.matrices));
  for (int64_t first = 0; first < rows;) {
    std::vector<WeightGradBlock> blocks;
    for (int64_t i = 0; i < blocks_ && first < rows; ++i) {
      const int64_t count = std::min(block_rows_, rows - first);
      GradMatrix* const own = matrices.data() + i * task_.matrices;
      lay_out(first, count, i * block_floats_, own);
      blocks.push_back({first, count, own});
      first += count;
    }
    const int64_t prepared =
        (static_cast<int64_t>(blocks.size()) - 1) * block_rows_ + blocks.back().count;
    parallel_for(0, prepared, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin / block_rows_; i * block_rows_ < end; ++i) {
        const int64_t start = i * block_rows_;
        const WeightGradBlock& block = blocks[static_cast<size_t>(i)];
        prepare(task_, block, std::max<int64_t>(begin - start, 0),
                std::min(end - start, block.count));
      }
    });
    multiply(blocks, is_last && first >= rows, to);
  }
}

void WeightGrad::multiply(const std::vector<WeightGradBlock>& blocks, bool is_last,
                          const WeightView& to) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), units());
  const GradMultiplyKernel kernel = RESNET_FUSED_CALL(grad_multiply_kernel);
  const GradStoreKernel store = RESNET_FUSED_CALL(grad_store_kernel, task_);
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      const int64_t end = units() * (worker + 1) / workers;
      for (int64_t i = units() * worker / workers; i < end; ++i) {
        const GradUnit own = unit(i, adds_, sums_.data() + (keeps_ ? i : worker) * unit_floats());
        kernel(task_, blocks, own);
        if (is_last && !store(task_, own, to)) is_finite_ = false;
      }
    }
  });
  adds_ = true;
}

}  // namespace resnet_fused
