// Convolution of any kernel, stride, padding and dilation as matrix products over taps.
//
//     y[p][k] = act(sum_taps sum_c x[p * stride + tap][c] w[k][c][tap] * scale[k] + shift[k] [+ r])
//
// A tile of 14 output pixels keeps its sums in registers over all taps and channels, and its pixels
// are read where they lie. Only where they cannot be (padding, NCHW input, channel counts whose
// strides fall into the same cache sets) the input rows of a unit of work are copied to a band,
// once for all taps and output channels. There is no im2col, but in one case: a bfloat16 image of
// three channels, whose pairs run along the kernel's row, 11 for 7 taps. With an even stride every
// output pixel's row begins with a whole pair, and rows overlap as in the image; else, or where not
// all numbers are finite, the band has a row for each output pixel. Bytes: x, the residual and y
// once, eager twice more. Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions
// on SIMD Architectures", arXiv:1808.05567.

#include "direct_conv.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "workspace.h"

#define KERNEL_HEADER "direct_conv_kernel.h"
#define RESNET_FUSED_WITH_BF16
#include "for_each_isa.h"

namespace resnet_fused {
namespace {

constexpr int64_t kBandFloats = 64 << 10;  // 256 KiB, a quarter of a common L2
constexpr int64_t kFewPixels = 512;
constexpr int64_t kTilePixels = 14;  // of AVX-512's tiles; others take 6

// The error of a sum grows with the length of its parts. An output of one pixel is a linear
// layer's, bound by its weights, so its parts may be short, as BLAS has them. Beside the rounding
// of bfloat16 data all of it is nothing.
int64_t longest_chain(const ConvArguments& conv) {
  if (conv.pairs) return int64_t{1} << 40;
  return conv.shape.out_height * conv.shape.out_width == 1 ? 64 : 512;
}

// All images as one row of pixels, where a 1 x 1 kernel leaves pixels as they are.
void flatten(ConvArguments& conv, int64_t* strides) {
  ConvShape& s = conv.shape;
  const bool pointwise = s.kernel[0] == 1 && s.kernel[1] == 1 && s.stride[0] == 1 &&
                         s.stride[1] == 1 && s.padding[0] == 0 && s.padding[1] == 0;
  if (!pointwise || conv.output_strides[2] != 0 || strides[1] != 1 ||
      strides[2] != s.width * strides[3] || strides[0] != s.height * strides[2]) {
    return;
  }
  s.width = s.out_width = s.batch * s.height * s.width;
  s.batch = s.height = s.out_height = 1;
}

bool is_flat(const ConvShape& shape) {
  return shape.batch == 1 && shape.out_height == 1;
}

// Whether the windows of a row begin with whole pairs where they lie in the image.
bool may_overlap(const ConvArguments& conv) {
  const ConvShape& s = conv.shape;
  return direct_has_windows(s.group_channels(), conv.pairs) && s.kernel[1] > 1 &&
         s.dilation[1] == 1 && s.stride[1] % 2 == 0;
}

DirectTask plan(const ConvArguments& arguments, const int64_t* input_strides, bool overlap) {
  DirectTask task{};
  task.conv = arguments;
  task.longest_chain = longest_chain(arguments);
  std::copy(input_strides, input_strides + 4, task.input_strides);
  flatten(task.conv, task.input_strides);
  const ConvShape& s = task.conv.shape;
  const int64_t channels = s.group_channels();
  const bool single_tap = s.kernel[0] == 1 && s.kernel[1] == 1;
  const auto reads_outside = [&](int i, int64_t size, int64_t outputs) {
    const int64_t last = (outputs - 1) * s.stride[i] + (s.kernel[i] - 1) * s.dilation[i];
    return s.padding[i] != 0 || last >= size;
  };
  const bool padded =
      reads_outside(0, s.height, s.out_height) || reads_outside(1, s.width, s.out_width);
  // 14 rows that are a multiple of 4 KiB apart share one of an L1's 64 sets of 8 lines.
  const int64_t* strides = task.input_strides;
  const int64_t per_word = arguments.per_word(), words = arguments.group_words();
  const bool collides = s.stride[1] * strides[3] / per_word % 1024 == 0;
  const bool splits_pairs =
      channels % per_word + strides[0] % per_word + strides[2] % per_word + strides[3] % per_word;
  task.copies = padded || !single_tap || strides[1] != 1 || collides || splits_pairs;
  task.windows = direct_has_windows(channels, arguments.pairs);
  // The taps of a row of the kernel in one run.
  const bool joined = task.windows || (words < 16 && s.dilation[1] == 1);
  const int64_t window = (s.kernel[1] * channels + 1) / 2;
  task.band_channels = task.windows ? window : joined ? words : (words + 15) / 16 * 16 + 16;
  task.depth = task.windows ? window : joined ? s.kernel[1] * words : words;

  // A unit is large enough to use weights from L3 many times, or small if they are in L2 anyway.
  const int64_t across = task.windows ? 1 : s.stride[1] / task.step(1);
  const int64_t per_pixel =
      (task.copies ? task.band_channels : words) * (s.stride[0] / task.step(0)) * across;
  const int64_t weights = task.panels() * kPanel * words * s.kernel[0] * s.kernel[1];
  int64_t pixels = std::max(2 * kTilePixels, kBandFloats / per_pixel);
  if (weights <= kBandFloats) pixels = std::min(pixels, 32 * kTilePixels);
  const bool flat = is_flat(s);
  const int64_t tiles = (s.out_width + kTilePixels - 1) / kTilePixels;
  task.unit_width = flat ? std::min(tiles, pixels / kTilePixels) * kTilePixels : s.out_width;
  task.unit_height = flat ? 1 : std::min(s.out_height, std::max<int64_t>(1, pixels / s.out_width));
  task.overlap = overlap;
  if (overlap) task.band_channels = s.stride[1] * channels / 2;

  for (int64_t r = 0; r < s.kernel[0]; ++r) {
    for (int64_t c = 0; c < (joined ? 1 : s.kernel[1]); ++c) {
      task.segments.push_back(r * s.dilation[0] * task.band_row() +
                              c * s.dilation[1] * task.band_channels);
    }
  }
  return task;
}

// Words of one output's weights.
int64_t packed_rows(int64_t channels, const int64_t* kernel, bool pairs) {
  if (direct_has_windows(channels, pairs)) return kernel[0] * ((kernel[1] * channels + 1) / 2);
  return kernel[0] * kernel[1] * (pairs ? (channels + 1) / 2 : channels);
}

// Calls body(Place) for a share of the output: [first, last) counts rows of all images, or tiles of
// the only row. Shares are cut evenly.
template <class Body>
void for_places(const DirectTask& task, bool flat, int64_t first, int64_t last, const Body& body) {
  const ConvShape& s = task.conv.shape;
  const int64_t most = flat ? task.unit_width / kTilePixels : task.unit_height;
  while (first < last) {
    const int64_t in_image =
        flat ? last : std::min(last, (first / s.out_height + 1) * s.out_height);
    const int64_t parts = (in_image - first + most - 1) / most;
    const int64_t count = (in_image - first + parts - 1) / parts;
    if (flat) {
      const int64_t x = first * kTilePixels;
      body(Place{0, 0, x, 1, std::min(count * kTilePixels, s.out_width - x)});
    } else {
      body(Place{first / s.out_height, first % s.out_height, 0, count, s.out_width});
    }
    first += count;
  }
}

}  // namespace

size_t direct_packed_words(int64_t out_channels, int64_t group_channels, const int64_t* kernel,
                           int64_t groups, bool pairs) {
  const int64_t panels = (out_channels / groups + kPanel - 1) / kPanel;
  return static_cast<size_t>(groups * panels * kPanel) *
         static_cast<size_t>(packed_rows(group_channels, kernel, pairs));
}

namespace {

// `Number` is float, or bf16 of which two make a word.
template <class Number>
void pack(const double* weight, int64_t outputs, int64_t channels, const int64_t* kernel,
          int64_t groups, Number* packed) {
  constexpr int64_t kPerWord = sizeof(float) / sizeof(Number);
  const bool windows = direct_has_windows(channels, kPerWord == 2);
  const int64_t panels = (outputs + kPanel - 1) / kPanel, taps = kernel[0] * kernel[1];
  const int64_t words = (channels + kPerWord - 1) / kPerWord;
  const int64_t window = (kernel[1] * channels + kPerWord - 1) / kPerWord;
  const int64_t size = packed_rows(channels, kernel, kPerWord == 2) * kPanel * kPerWord;
  parallel_for(0, groups * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % panels * kPanel, group = index / panels;
      Number* const to = packed + index * size;
      for (int64_t i = 0; i < size; ++i) write_packed(to, i, 0.0);
      for (int64_t n = 0; n < kPanel && first + n < outputs; ++n) {
        const double* w = weight + (group * outputs + first + n) * channels * taps;
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t in_row = t % kernel[1] * channels + c;  // of a window
            const int64_t number =
                windows ? t / kernel[1] * window * kPerWord + in_row : t * words * kPerWord + c;
            const int64_t row = number / kPerWord;
            write_packed(to, (row * kPanel + n) * kPerWord + number % kPerWord, w[c * taps + t]);
          }
        }
      }
    }
  });
}

}  // namespace

void direct_pack(const double* weight, int64_t out_channels, int64_t channels,
                 const int64_t* kernel, int64_t groups, bool pairs, void* packed) {
  const int64_t outputs = out_channels / groups;
  if (pairs) {
    pack(weight, outputs, channels, kernel, groups, static_cast<bf16*>(packed));
  } else {
    pack(weight, outputs, channels, kernel, groups, static_cast<float*>(packed));
  }
}

void direct_run(const ConvArguments& arguments, const int64_t* input_strides) {
  const DirectTask apart = plan(arguments, input_strides, false);
  const bool overlap = may_overlap(arguments);
  DirectTask task = overlap ? plan(arguments, input_strides, true) : apart;
  task.apart = overlap ? &apart : nullptr;
  const ConvShape& s = task.conv.shape;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = s.groups * task.panels();
  // Few pixels: the threads share out the output channels as well.
  const bool split = s.batch * s.out_height * s.out_width <= kFewPixels;
  const int64_t across = split ? std::min(threads, panels) : 1;
  const bool flat = is_flat(s);
  const int64_t pieces =
      flat ? (s.out_width + kTilePixels - 1) / kTilePixels : s.batch * s.out_height;
  const int64_t along = std::min(pieces, std::max<int64_t>(1, threads / across));

  const int64_t run_floats =
      task.most_runs() * static_cast<int64_t>(sizeof(PixelRun) / sizeof(float));
  const int64_t band = std::max(task.band(), apart.band());
  const int64_t each = (band + run_floats + 1023) / 1024 * 1024;
  const Workspace workspace(static_cast<size_t>(along * across * each));
  const DirectKernel kernel = RESNET_FUSED_CALL_BF16(direct_kernel_for, task);
  check(kernel != nullptr, "_packed_convs: packed is bfloat16, which needs AVX512_BF16");
  parallel_for(0, along * across, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      float* const own = workspace.data() + worker * each;
      const int64_t piece = worker / across, part = worker % across;
      const int64_t begin = panels * part / across, end = panels * (part + 1) / across;
      for_places(task, flat, pieces * piece / along, pieces * (piece + 1) / along,
                 [&](const Place& place) {
                   for (int64_t panel = begin; panel < end;) {
                     const int64_t group = panel / task.panels(), start = group * task.panels();
                     const int64_t stop = std::min(end, start + task.panels());
                     kernel(task, place, group, panel - start, stop - start, own + run_floats,
                            reinterpret_cast<PixelRun*>(own));
                     panel = stop;
                   }
                 });
    }
  });
}

}  // namespace resnet_fused
