// 3 x 3 convolution as Winograd's F(m x m, 3 x 3) with m = 4, 3 or 2.
//
//     y = act(A^T [sum_c U (.) (B^T d B)] A + shift [+ residual]),  U = G (w * scale) G^T
//
// With m = 4 36 multiplications make 16 outputs, 2.25 each instead of 9 (F(2 x 2): 4). Direct
// convolution runs at the FMA peak already, so this is the way past it. Tiles are cut by the image:
// 14 x 14 takes 484 products an image and not 576, 7 x 7 takes 121 and not 144
// (winograd_transform.h).
//
// Per block of tiles: their inputs are transformed to [point][channel / 16][tile][16]; then for
// each panel of 32 output channels 36 small matrix products run over weights that lie in the order
// of access, and their results are transformed, finished and written. Nothing but x, the residual
// and y leaves the caches. Lavin, Gray: "Fast Algorithms for Convolutional Neural Networks",
// arXiv:1509.09308; Barabasz et al. on the points, arXiv:1803.10986.
//
// Every output is one sum over channels in one order, whatever the block and the thread count, so
// results are the same bit for bit.

#include "winograd.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

#define KERNEL_HEADER "winograd_kernel.h"
#define RESNET_FUSED_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

// The weights of a line as sums of taps: U_p = g[0] + g[1] p + g[2] p^2, and g[2] at infinity. With
// stride 2 the even inputs' kernel is g[0] + g[2] p, and the odd ones' g[1].
using Taps = std::array<double, 3>;

std::vector<Taps> weights_of_line(int64_t largest, int64_t stride) {
  std::vector<Taps> taps;
  const int64_t finite = stride == 2 ? largest : largest + 1;
  for (int64_t i = 0; i < finite; ++i) {
    const double p = kWinogradPoints[i];
    taps.push_back(stride == 2 ? Taps{1, 0, p} : Taps{1, p, p * p});
  }
  taps.push_back({0, 0, 1});
  if (stride == 2) taps.push_back({0, 1, 0});
  return taps;
}

// Words of transformed input that a thread keeps, where it goes through many weights: 5 MiB of L3.
constexpr int64_t kTransformedWords = 5 << 18;

// Tiles of a block: as many as the micro-kernel has rows, or twice where a thread has few, since
// their weights come from memory and every block but the first reads them again.
constexpr int64_t kBlock = 14;
constexpr int64_t kFewTiles = 8 * kBlock;

// Floats above which weights come from L3 or memory at every block: F(4 x 4) of 256 x 256 channels.
constexpr int64_t kManyWeights = int64_t(2) << 20;

}  // namespace

size_t winograd_packed_words(int64_t out_channels, int64_t group_words, int64_t groups,
                             int64_t largest, bool late) {
  const int64_t panels = (out_channels / groups + kPanel - 1) / kPanel;
  const int64_t taps = late ? 9 : (largest + 2) * (largest + 2);
  return static_cast<size_t>(groups * panels * taps * group_words * kPanel);
}

namespace {

// `Number` is float, or bf16 of which two make a word.
template <class Number>
void pack(const double* weight, int64_t outputs, int64_t channels, int64_t groups,
          const std::vector<Taps>& g, bool late, Number* packed) {
  constexpr int64_t kPerWord = sizeof(float) / sizeof(Number);
  const int64_t along = g.size(), panels = (outputs + kPanel - 1) / kPanel;
  const int64_t padded = (channels + kPerWord - 1) / kPerWord * kPerWord;
  parallel_for(0, groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t group = index / panels, first = index % panels * kPanel;
      Number* const to = packed + index * along * along * padded * kPanel;
      for (int64_t c = 0; c < padded; ++c) {
        for (int64_t n = 0; n < kPanel; ++n) {
          double half[6][3] = {};
          const bool inside = first + n < outputs && c < channels;
          const double* w = weight + ((group * outputs + first + n) * channels + c) * 9;
          for (int64_t p = 0; inside && p < along; ++p) {
            for (int64_t s = 0; s < 3; ++s) {
              half[p][s] = g[p][0] * w[s] + g[p][1] * w[3 + s] + g[p][2] * w[6 + s];
            }
          }
          for (int64_t p = 0; p < along; ++p) {
            for (int64_t q = 0; q < along; ++q) {
              const double u = half[p][0] * g[q][0] + half[p][1] * g[q][1] + half[p][2] * g[q][2];
              const int64_t point = p * along + q;
              const int64_t row =
                  late ? c * along * along + point : (point * padded + c) / kPerWord;
              write_packed(to, (row * kPanel + n) * kPerWord + c % kPerWord, u);
            }
          }
        }
      }
    }
  });
}

}  // namespace

void winograd_pack(const double* weight, int64_t out_channels, int64_t channels, int64_t groups,
                   int64_t largest, int64_t stride, bool pairs, bool late, void* packed) {
  const std::vector<Taps> g =
      late ? std::vector<Taps>{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}} : weights_of_line(largest, stride);
  const int64_t outputs = out_channels / groups;
  if (pairs) {
    pack(weight, outputs, channels, groups, g, late, static_cast<bf16*>(packed));
  } else {
    pack(weight, outputs, channels, groups, g, late, static_cast<float*>(packed));
  }
}

void winograd_run(const ConvArguments& conv, const PlainWeight& plain, int64_t largest, bool late) {
  WinogradTask task{conv, plain, largest, late, 0};
  const ConvShape& shape = conv.shape;
  const int64_t tiles = shape.batch * WinogradTiles{shape.out_height, largest}.count() *
                        WinogradTiles{shape.out_width, largest}.count();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t channels = conv.group_words();

  // Many channels or few tiles: the threads share out the output channels, so that each reads a
  // part of the weights and not all of them, and transforms every tile itself.
  const int64_t weights = task.panels() * kPanel * channels * task.weights();
  const bool few_for_weights = weights >= kManyWeights && tiles <= threads * kWinogradLargestBlock;
  // Pairs that every block makes again take as long as its products.
  const bool makes_pairs = late && conv.pairs;
  const bool split =
      task.panels() >= threads && (few_for_weights || makes_pairs || tiles < threads * kBlock);
  const int64_t fits = kTransformedWords / (channels * task.entries());
  const int64_t by_thread = split ? tiles : (tiles + threads - 1) / threads;
  const int64_t largest_block = makes_pairs ? kWinogradLargestBlock : kWinogradLargestBlock / 2;
  const int64_t most = split                    ? std::clamp(fits, kBlock, largest_block)
                       : by_thread <= kFewTiles ? 2 * kBlock
                                                : kBlock;
  const int64_t blocks_each = (by_thread + most - 1) / most;
  task.block = (by_thread + blocks_each - 1) / blocks_each;
  const int64_t blocks = (tiles + task.block - 1) / task.block;
  const int64_t splits = split ? std::min(threads, task.panels()) : 1;
  const int64_t units = shape.groups * splits * blocks;
  const int64_t workers = std::min(threads, units);
  const int64_t each = (task.workspace() + 1023) / 1024 * 1024;

  const Workspace workspace(static_cast<size_t>(workers * each + shape.channels));
  float* const zeros = workspace.data() + workers * each;
  std::fill(zeros, zeros + shape.channels, 0.0f);
  const WinogradKernel kernel = RESNET_FUSED_CALL_BF16(winograd_kernel_for, task);
  check(kernel != nullptr, "_packed_convs: packed is bfloat16, which needs AVX512_BF16");
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      const int64_t end = units * (worker + 1) / workers;
      for (int64_t unit = units * worker / workers; unit < end; ++unit) {
        const int64_t block = unit % blocks, part = unit / blocks % splits;
        const int64_t group = unit / blocks / splits;
        const int64_t start = block * task.block;
        kernel(task, start, std::min(task.block, tiles - start), group,
               task.panels() * part / splits, task.panels() * (part + 1) / splits,
               workspace.data() + worker * each, zeros);
      }
    }
  });
}

}  // namespace resnet_fused
