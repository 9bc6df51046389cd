// 1 x 1 convolution with seven products in the place of eight.
//
//     [C11 C12]   [A11 A12] [B11 B12]      A: pixels x channels, B: channels x output channels,
//     [C21 C22] = [A21 A22] [B21 B22]      both cut in halves
//
// Winograd's form of Strassen's algorithm, one step of it: sums of blocks of A and B make seven
// products whose sums are C. Direct convolution runs at the multiply-add peak already; this does
// 1/8 less. The sums of B are made once, in float64, with the scale in them. A pair of tiles of 14
// pixels is the two halves of A: their sums are made once for all output channels and stay in L2,
// and the sums of products stay in registers or L1. Bytes as in direct convolution.
//
// The two tiles see each other's rounding: numbers of one cancel in the sums of the other. So both
// are of one image, cut into pairs of nearly equal size, and no image depends on another.
//
// Strassen, "Gaussian Elimination is not Optimal", 1969; Winograd, "On Multiplication of 2 x 2
// Matrices", 1971. One step costs little accuracy: Higham, "Accuracy and Stability of Numerical
// Algorithms", 23.2.2.

#include "strassen.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

#define KERNEL_HEADER "strassen_kernel.h"
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kBlockFloats = 64 << 10;  // of a unit of work: a quarter of a common L2
constexpr int64_t kFewPixels = 512;

}  // namespace

bool strassen_takes(int64_t out_channels, int64_t group_channels, int64_t groups) {
  return groups == 1 && group_channels % 32 == 0 && out_channels % (2 * kPanel) == 0;
}

size_t strassen_packed_floats(int64_t out_channels, int64_t channels) {
  return static_cast<size_t>(out_channels / 2 * kProducts * channels / 2);
}

void strassen_pack(const double* weight, int64_t out_channels, int64_t channels, float* packed) {
  const int64_t half = channels / 2, columns = out_channels / 2;
  parallel_for(0, columns / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t c = 0; c < half; ++c) {
        for (int64_t n = 0; n < kPanel; ++n) {
          const double* left = weight + (panel * kPanel + n) * channels + c;
          const double* right = left + columns * channels;
          const double b11 = left[0], b21 = left[half], b12 = right[0], b22 = right[half];
          const double t1 = b12 - b11, t2 = b22 - t1, t3 = b22 - b12, t4 = t2 - b21;
          const double products[kProducts] = {b11, b21, t2, t3, -t4, t1, b22};
          for (int64_t i = 0; i < kProducts; ++i) {
            packed[((panel * kProducts + i) * half + c) * kPanel + n] =
                static_cast<float>(products[i]);
          }
        }
      }
    }
  });
}

void strassen_run(const ConvArguments& conv, const void* weight, const int64_t* weight_strides,
                  const float* scale) {
  const StrassenTask task{conv, weight, {weight_strides[0], weight_strides[1]}, scale};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = RESNET_FUSED_CALL(strassen_pair_pixels);
  const int64_t pixels = task.conv.shape.batch * task.image_pixels();
  const int64_t pairs = task.conv.shape.batch * task.image_pairs(size);
  // Few pixels: the threads share out the output channels as well.
  const int64_t across = pixels <= kFewPixels ? std::min(threads, task.panels()) : 1;
  const int64_t along = std::min(pairs, std::max<int64_t>(1, threads / across));
  // Pairs whose blocks are made together, so that weights are read once for all of them.
  const int64_t block = kProducts * size / 2 * task.row();
  const int64_t unit = std::clamp<int64_t>(kBlockFloats / block, 1, (pairs + along - 1) / along);
  const int64_t each = (unit * block + 1023) / 1024 * 1024;
  const Workspace workspace(static_cast<size_t>(along * across * each));
  const StrassenKernel kernel = RESNET_FUSED_CALL(strassen_kernel_for, task);
  parallel_for(0, along * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      const int64_t piece = worker / across, part = worker % across;
      const int64_t begin = task.panels() * part / across;
      const int64_t end = task.panels() * (part + 1) / across;
      // In whole pairs, so that which pixels make a pair does not depend on the threads.
      const int64_t stop = pairs * (piece + 1) / along;
      for (int64_t pair = pairs * piece / along; pair < stop; pair += unit) {
        kernel(task, pair, std::min(pair + unit, stop), begin, end,
               workspace.data() + worker * each);
      }
    }
  });
}

}  // namespace resnet_fused
