// The gradient of a convolution's weights: what the launcher and the kernels agree on
// (weight_grad.cpp says the rest).
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "weight_view.h"
#include "winograd.h"
#include "workspace.h"

namespace resnet_fused {

// One matrix of a block: dw[k][c] += sum_row a[row][k] b[row][c]. Both lie as [channel /
// 16][row][16], the 16s `stride` floats apart, and begin so many floats into the workspace.
struct GradMatrix {
  int64_t a, b;
  int64_t rows;
  int64_t a_stride, b_stride;
};

constexpr int64_t kMostJoined = 768;  // columns of all taps together

struct WeightGradTask {
  ConvShape shape;    // groups = 1; the batch is what one call of add() takes
  const void* input;  // channels innermost, dense
  const void* grad;   // of the output, likewise
  bool is_bf16;
  bool winograd;     // F(4 x 4, 3 x 3), stride 1 or 2
  int64_t matrices;  // points, or taps, or one where a tap has few channels
  int64_t columns;   // of a matrix: input channels, or those of all taps
  float* workspace;
  const void* zeros;  // as many as there are channels on either side

  int64_t column_panels() const { return (columns + kPanel - 1) / kPanel; }
  int64_t row_chunks() const { return (shape.out_channels + 15) / 16; }
  bool joins_taps() const { return !winograd && columns != shape.channels; }
};

// Tiles of one block, or output pixels [first, first + count) of all images.
struct WeightGradBlock {
  int64_t first, count;
  const GradMatrix* matrices;
};

// Transforms or copies a share of a block's tiles or pixels.
using GradPrepareKernel = void (*)(const WeightGradTask& task, const WeightGradBlock& block,
                                   int64_t begin, int64_t end);

// 16 k's times `chunks`, 32 c's: all matrices of all blocks, added to sums[matrix][chunk][16][32]
// or, at the first time, written there.
struct GradUnit {
  int64_t chunk, chunks;  // of k
  int64_t panel;          // of c
  bool adds;
  float* sums;
};
using GradMultiplyKernel = void (*)(const WeightGradTask& task,
                                    const std::vector<WeightGradBlock>& blocks,
                                    const GradUnit& unit);

// The taps' gradients from the sums.
// False if one is NaN or infinite.
using GradStoreKernel = bool (*)(const WeightGradTask& task, const GradUnit& unit,
                                 const WeightView& to);

// Adds up the gradient over parts of a batch.
class WeightGrad {
 public:
  // `shape` is the whole convolution's; add() takes at most `most_images` at a time.
  WeightGrad(const ConvShape& shape, bool winograd, bool is_bf16, int64_t most_images);
  // After the last part the gradient is in `to`, whose numbers are written.
  void add(const void* input, const void* grad, int64_t images, bool is_last, const WeightView& to);
  // Whether the gradient has neither NaN nor infinities. Those may be where they do not belong.
  bool is_finite() const { return is_finite_; }

 private:
  int64_t row_chunk_units() const { return (task_.row_chunks() + chunks_ - 1) / chunks_; }
  int64_t units() const { return row_chunk_units() * task_.column_panels(); }
  int64_t unit_floats() const { return task_.matrices * chunks_ * 16 * kPanel; }
  GradUnit unit(int64_t index, bool adds, float* sums) const;
  void lay_out(int64_t first, int64_t count, int64_t at, GradMatrix* matrices) const;
  void add_shared(int64_t rows, bool is_last, const WeightView& to);
  void add_private(int64_t rows);
  void multiply(const std::vector<WeightGradBlock>& blocks, bool is_last, const WeightView& to);
  void reduce(const WeightView& to);

  WeightGradTask task_;
  int64_t rows_of_image_;  // tiles or pixels
  int64_t chunks_;         // of a unit
  int64_t block_rows_;     // most tiles or pixels of a block
  int64_t blocks_;         // prepared at a time, at most
  int64_t block_floats_;
  int64_t workers_;    // that have sums of their own; 0 if each sum has one owner
  bool keeps_;         // sums outlive a call
  bool adds_ = false;  // there are some
  std::atomic<bool> is_finite_{true};
  Workspace prepared_, sums_;
};

}  // namespace resnet_fused
