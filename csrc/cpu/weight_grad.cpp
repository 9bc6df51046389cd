// The gradient of a convolution's weights as matrix products over pixels, or over Winograd's tiles:
//
//     dw[k][c][tap] = sum_pixels dy[pixel][k] x[pixel * stride + tap][c]
//     dw = G^T (sum_tiles (A dy A^T)[k] (.) (B^T x B)[c]) G           3 x 3, F(4 x 4), stride 1 or
//     2
//
// The second form has 36 products for a tile's 144. Its tiles are those of the forward convolution,
// smaller ones at the image's edge (winograd_transform.h).
//
// Some blocks of 64 tiles or 128 pixels at a time are prepared: transformed, or copied, to
// [16 channels][row][16], so that the products run over memory in order. Then each thread takes
// its share of the gradient, 64 k's x 32 c's at a time, and adds up all blocks. So every sum has
// one owner and one order, and results are the same bit for bit at any thread count, without
// partial sums. Lavin, Gray: "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308.

#include "weight_grad.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <utility>

#include "isa.h"

#define KERNEL_HEADER "weight_grad_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kPreparedFloats = int64_t(3) << 18;  // 3 MiB, a tenth of L3
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

bool weight_grad_takes(const ConvShape& s, bool winograd) {
  const bool square = s.kernel[0] == 3 && s.kernel[1] == 3 && s.stride[0] == s.stride[1] &&
                      s.stride[0] <= 2 && s.dilation[0] == 1 && s.dilation[1] == 1;
  return s.groups == 1 && (square || !winograd);
}

WeightGrad::WeightGrad(const ConvShape& shape, bool winograd, bool is_bf16, int64_t most_images)
    : task_{shape, nullptr, nullptr, is_bf16, winograd, 36, shape.channels, nullptr, nullptr} {
  const int64_t taps = shape.kernel[0] * shape.kernel[1];
  if (!winograd) {
    const bool joins = shape.channels < kLeastJoined && taps > 1;
    task_.matrices = joins ? 1 : taps;
    task_.columns = joins ? taps * shape.channels : shape.channels;
  }
  const int64_t rows_of_image = winograd ? tiles_of(shape) : shape.out_height * shape.out_width;
  block_rows_ = winograd ? kWinogradLargestBlock : kBlockPixels;
  const int64_t a = task_.row_chunks(), b = chunks16(task_.columns);
  // With stride 2 the odd inputs' matrices have up to 16 rows for a tile.
  const int64_t row_numbers = winograd ? (shape.stride[0] == 2 ? 81 : 36) : 1;
  block_floats_ = winograd ? row_numbers * (a + b) * chunk_stride(block_rows_)
                           : (a + task_.matrices * b) * chunk_stride(block_rows_);
  const int64_t rows = std::min(shape.batch, most_images) * rows_of_image;
  const int64_t needed = (rows + block_rows_ - 1) / block_rows_;
  blocks_ = std::clamp<int64_t>(kPreparedFloats / block_floats_, 1, needed);
  keeps_ = blocks_ < needed || most_images < shape.batch;

  const int64_t threads = torch::stable::get_num_threads();
  // As large as possible, if it leaves no thread idle for more than a tenth of the time.
  int64_t units = 0;
  for (chunks_ = kMostChunks;; chunks_ /= 2) {
    units = (a + chunks_ - 1) / chunks_ * task_.column_panels();
    if (chunks_ == 1 || 10 * units >= 9 * ((units + threads - 1) / threads * threads)) break;
  }
  const int64_t sums = task_.matrices * chunks_ * 16 * kPanel;
  const int64_t zeros = (std::max(shape.channels, shape.out_channels) + 15) / 16 * 16;
  prepared_ = Workspace(static_cast<size_t>(blocks_ * block_floats_ + zeros));
  sums_ = Workspace(static_cast<size_t>((keeps_ ? units : std::min(threads, units)) * sums));
  task_.workspace = prepared_.data();
  task_.zeros = prepared_.data() + blocks_ * block_floats_;
  std::fill_n(prepared_.data() + blocks_ * block_floats_, zeros, 0.0f);
}

void WeightGrad::add(const void* input, const void* grad, int64_t images, bool is_last,
                     const WeightView& to) {
  task_.input = input, task_.grad = grad, task_.shape.batch = images;
  const int64_t rows_of_image =
      task_.winograd ? tiles_of(task_.shape) : task_.shape.out_height * task_.shape.out_width;
  const int64_t rows = images * rows_of_image;
  const GradPrepareKernel prepare = RESNET_FUSED_CALL(grad_prepare_kernel, task_);
  const int64_t a = task_.row_chunks(), b = chunks16(task_.columns);
  std::vector<GradMatrix> matrices(static_cast<size_t>(blocks_ * task_.matrices));
  for (int64_t first = 0; first < rows;) {
    std::vector<WeightGradBlock> blocks;
    for (int64_t i = 0; i < blocks_ && first < rows; ++i) {
      const int64_t count = std::min(block_rows_, rows - first);
      GradMatrix* const own = matrices.data() + i * task_.matrices;
      std::array<int64_t, kWinogradMostWeights> tile_rows{};
      if (task_.winograd) {
        RESNET_FUSED_CALL(count_tile_rows, task_.shape, first, count, tile_rows.data());
      }
      int64_t at = i * block_floats_;
      for (int64_t m = 0; m < task_.matrices; ++m) {
        const int64_t of_matrix = task_.winograd ? tile_rows[m] : count;
        const int64_t stride = chunk_stride(of_matrix);
        const bool has_own_a = task_.winograd || m == 0;
        own[m] = {has_own_a ? at : own[0].a, at + (has_own_a ? a * stride : 0), of_matrix, stride,
                  stride};
        at = own[m].b + b * stride;
      }
      blocks.push_back({first, count, own});
      first += count;
    }
    const int64_t prepared =
        (static_cast<int64_t>(blocks.size()) - 1) * block_rows_ + blocks.back().count;
    torch::stable::parallel_for(0, prepared, 1, [&](int64_t begin, int64_t end) {
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
  const int64_t panels = task_.column_panels(), chunks = task_.row_chunks();
  const int64_t units = (chunks + chunks_ - 1) / chunks_ * panels;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), units);
  const int64_t floats = task_.matrices * chunks_ * 16 * kPanel;
  const GradMultiplyKernel kernel = RESNET_FUSED_CALL(grad_multiply_kernel);
  const GradStoreKernel store = RESNET_FUSED_CALL(grad_store_kernel, task_);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      const int64_t end = units * (worker + 1) / workers;
      for (int64_t i = units * worker / workers; i < end; ++i) {
        const int64_t chunk = i % ((chunks + chunks_ - 1) / chunks_) * chunks_;
        const GradUnit unit{chunk, std::min(chunks_, chunks - chunk),
                            i / ((chunks + chunks_ - 1) / chunks_), adds_,
                            sums_.data() + (keeps_ ? i : worker) * floats};
        kernel(task_, blocks, unit);
        if (is_last && !store(task_, unit, to)) is_finite_ = false;
      }
    }
  });
  adds_ = true;
}

}  // namespace resnet_fused
