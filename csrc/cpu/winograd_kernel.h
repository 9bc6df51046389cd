// One block of tiles: V = B^T d B per tile (winograd_tiles.h), M = V U per weight, y = A^T M A.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "gemm_kernel.h"
#include "winograd_tiles.h"
#include "gather_weights.h"
#include "winograd_weights.h"

// ---- products ----------------------------------------------------------------------------------

template <class Element, int... kRows>
struct GemmTable {
  static constexpr decltype(&gemm_to_memory<Element, 1>) kByRows[] = {
      gemm_to_memory<Element, kRows>...};
};
#if RESNET_FUSED_VECTOR_BYTES == 64
template <class Element>
using Gemms = GemmTable<Element, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
template <class Element>
using Gemms = GemmTable<Element, 1, 2, 3, 4, 5, 6>;
#endif

// One weight's matrix, or so many channels of it, which are added to what is there. No sum has more
// than `chain` products.
template <class Element, class Ahead>
void multiply(const float* transformed, int64_t rows, const float* weights, int64_t depth,
              int64_t chain, const Ahead& ahead, bool adds, float* products) {
  const int64_t parts = (rows + kGemmRows - 1) / kGemmRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    ReadAhead mine = ahead(part);
    for (int64_t k = 0; k < depth; k += chain) {
      const int64_t length = depth - k < chain ? depth - k : chain;
      const float* first = transformed + begin * 16 + k * rows;
      const float* second = first + first_half(end - begin) * 16;
      Gemms<Element>::kByRows[end - begin - 1]({first, second, 16, rows * 16}, weights + k * kPanel,
                                               length, mine, adds || k > 0,
                                               products + begin * kPanel);
      mine.next += length * mine.step;
      mine.left -= length;
    }
  }
}

// The plain weights that the next part gathers, in groups of 32 lines, each to be read during one
// pass over a matrix.
inline int64_t expected_groups(const PanelPart& part) {
  return 9 * ((part.channels + 15) / 16);
}
inline ReadAhead expect_weights(const WeightView& view, const PanelPart& part, int64_t group) {
  const float* const from = view.data + part.group * view.group_stride +
                            part.panel * kPanel * view.output_stride +
                            part.first * view.input_stride;
  if (group >= expected_groups(part) || part.panel * kPanel + kPanel > view.outputs) {
    return {view.data, 0};
  }
  const int64_t tap = group % 9, chunk = group / 9;
  const float* const own = from + tap / 3 * view.tap_stride[0] + tap % 3 * view.tap_stride[1];
  if (view.output_stride == 1) {  // of 32 channels half of the outputs
    return {own + chunk / 2 * 32 * view.input_stride + chunk % 2 * 16, view.input_stride, 32};
  }
  if (view.input_stride == 1) return {own + chunk * 16, view.output_stride, 32};
  return {from + group * 16, view.output_stride, 32};  // the taps of one channel side by side
}

// [channel][tap][32] to [weight][channel or pair][32].
template <class Element, int kStride>
void transform_late(const WinogradTask& task, const float* taps, int64_t channels, float* to) {
  if constexpr (Element::kPerWord == 1) {
    transform_weights<kStride>(taps, channels, kLateSlice, to);
  }
#if RESNET_FUSED_BF16_INSTRUCTIONS
  if constexpr (Element::kPerWord == 2) {
    const auto transform =
        task.largest == 2 ? transform_weight_pairs<kStride, 2> : transform_weight_pairs<kStride, 3>;
    transform(taps, channels, kLateSlice, to);
  }
#endif
}

// Where weights are transformed here, it is done with as many channels as L2 holds at a time, and
// the next ones' taps come in during the products: of a step's 32 x 9 floats each weight's share.
template <class Element, int kStride, class Between>
void multiply_panel(const WinogradTask& task, const WinogradBlock& block, int64_t group,
                    int64_t panel, float* workspace, Between between) {
  const int64_t depth = task.conv.group_words(), weights = task.weights();
  const float* const packed = task.gathers()
                                  ? nullptr
                                  : task.conv.packed + (group * task.panels() + panel) *
                                                           task.packed_weights() * depth * kPanel;
  const WeightView view = view_plain(task.plain, task.conv.shape);
  const int64_t piece = task.late ? kLateWords : depth;
  float* const late = workspace + task.late_weights();
  for (int64_t first = 0; first < depth; first += piece) {
    const int64_t length = depth - first < piece ? depth - first : piece;
    const float* taps = packed + first * 9 * kPanel;
    const bool is_last = first + length >= depth;
    const int64_t channels = length * Element::kPerWord;
    const PanelPart next{group, is_last ? panel + 1 : panel,
                         is_last ? 0 : (first + length) * Element::kPerWord, channels};
    if (task.gathers()) {
      float* const own = workspace + task.late_taps();
      gather_panel(view, {group, panel, first * Element::kPerWord, channels}, {9 * kPanel, kPanel},
                   own);
      taps = own;
    }
    if (task.late) transform_late<Element, kStride>(task, taps, channels, late);
    for (int64_t w = 0; w < weights; ++w) {
      if (first == 0) between(w);
      if (block.rows[w] == 0) continue;
      const float* const matrix = task.late ? late + w * kLateSlice : packed + w * depth * kPanel;
      const auto ahead = [&](int64_t pass) -> ReadAhead {
        if (task.gathers()) {
          const int64_t passes = (expected_groups(next) + weights - 1) / weights;
          return pass < passes ? expect_weights(view, next, w * passes + pass)
                               : ReadAhead{matrix, 0};
        }
        constexpr int64_t kShare = kPanel * 9 / kWinogradMostWeights;
        const ReadAhead whole = task.late
                                    ? ReadAhead{taps + length * (9 * kPanel + w * kShare), kShare}
                                    : ReadAhead{matrix + depth * kPanel, kPanel};
        return whole.in_pass(pass);
      };
      multiply<Element>(workspace + block.inputs[w] + first * block.rows[w], block.rows[w], matrix,
                        length, task.chain(), ahead, first > 0, workspace + block.products[w]);
    }
  }
}

// ---- output ------------------------------------------------------------------------------------

// One tile's outputs, [kHeight][kWidth][32]. `check` becomes NaN where one of them is not finite.
template <int kHeight, int kWidth, int kStride>
DEVICE_INLINE void transform_products(const float* const* products, int lane, Vector& check,
                                      Vector (&y)[kHeight][kWidth]) {
  using Column = Line<kHeight, kStride>;
  using Row = Line<kWidth, kStride>;
  Vector half[Row::kSize][kHeight];
#pragma GCC unroll 9
  for (int x = 0; x < Row::kSize; ++x) {
    Vector m[Column::kSize];
#pragma GCC unroll 9
    for (int i = 0; i < Column::kSize; ++i) m[i] = load(products[i * Row::kSize + x] + lane);
    Column::output(m, half[x]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
    Vector m[Row::kSize];
#pragma GCC unroll 9
    for (int x = 0; x < Row::kSize; ++x) m[x] = half[x][i];
    Row::output(m, y[i]);
#pragma GCC unroll 4
    for (int x = 0; x < kWidth; ++x) check += y[i][x] * 0.0f;
  }
}

DEVICE_INLINE bool has_nan(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i] != lanes[i];
  return found;
}

struct OutputPlace {
  int64_t offset;  // of the tile's first pixel and the panel's first channel
  int64_t row_stride, pixel_stride;
  int64_t height, width;  // of the tile inside the image
};

template <class T, int kHeight, int kWidth, int kStride>
bool transform_output(const float* const* products, const Finish<T>& finish,
                      const OutputPlace& place) {
  Vector check{};
  float sums[kHeight * kWidth][kPanel];
  const bool direct = in_registers(finish) && place.height == kHeight && place.width == kWidth;
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    Vector y[kHeight][kWidth];
    transform_products<kHeight, kWidth, kStride>(products, lane, check, y);
#pragma GCC unroll 4
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        if (direct) {
          finish_vector(finish, place.offset + i * place.row_stride + j * place.pixel_stride, lane,
                        y[i][j]);
        } else {
          store(sums[i * kWidth + j] + lane, y[i][j]);
        }
      }
    }
  }
  if (!direct) {
    for (int64_t i = 0; i < place.height; ++i) {
      for (int64_t j = 0; j < place.width; ++j) {
        finish_row(finish, place.offset + i * place.row_stride + j * place.pixel_stride,
                   sums[i * kWidth + j]);
      }
    }
  }
  return !has_nan(check);
}

// The tile again by the definition, for data that is not finite: an infinity would make every
// output of its tile NaN, where eager PyTorch has NaN or infinity in nine of them.
template <class T, class Weight>
void convolve_tile(const WinogradTask& task, const WinogradTile& tile, int64_t group,
                   int64_t channel, const Finish<T>& finish, const OutputPlace& place) {
  const ConvShape& shape = task.conv.shape;
  const int64_t channels = shape.group_channels();
  for (int64_t i = 0; i < place.height; ++i) {
    for (int64_t j = 0; j < place.width; ++j) {
      float sums[kPanel] = {};
      for (int64_t n = 0; n < finish.columns; ++n) {
        float sum = 0;
        for (int64_t r = 0; r < 3; ++r) {
          const int64_t y = (tile.y + i) * task.stride() + r - shape.padding[0];
          for (int64_t s = 0; s < 3; ++s) {
            const int64_t x = (tile.x + j) * task.stride() + s - shape.padding[1];
            if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
            const T* pixel = static_cast<const T*>(task.conv.input) +
                             ((tile.image * shape.height + y) * shape.width + x) * shape.channels +
                             group * channels;
            const int64_t* const stride = task.plain.strides;
            const Weight* weight = static_cast<const Weight*>(task.plain.data) +
                                   (channel + n) * stride[0] + r * stride[2] + s * stride[3];
            for (int64_t c = 0; c < channels; ++c) {
              sum += as_float(pixel[c]) * as_float(weight[c * stride[1]]);
            }
          }
        }
        sums[n] = task.plain.scale == nullptr ? sum : sum * task.plain.scale[channel + n];
      }
      finish_row(finish, place.offset + i * place.row_stride + j * place.pixel_stride, sums);
    }
  }
}

// Brings in the lines that a tile will write, and those of its residual.
template <class T>
void expect_tile(const WinogradTask& task, const WinogradTile& tile, int64_t group, int64_t panel) {
  const ConvShape& shape = task.conv.shape;
  const T* const residual = static_cast<const T*>(task.conv.residual);
  T* const output = static_cast<T*>(task.conv.output);
  const int64_t channel = group * shape.group_out_channels() + panel * kPanel;
  for (int64_t i = 0; i < tile.height && tile.y + i < shape.out_height; ++i) {
    for (int64_t j = 0; j < tile.width && tile.x + j < shape.out_width; ++j) {
      const int64_t offset =
          ((tile.image * shape.out_height + tile.y + i) * shape.out_width + tile.x + j) *
              shape.out_channels +
          channel;
      for (size_t c = 0; c < kPanel; c += 64 / sizeof(T)) {
        if (residual != nullptr) __builtin_prefetch(residual + offset + c);
        __builtin_prefetch(output + offset + c, 1);
      }
    }
  }
}

template <class T, int kStride>
void transform_outputs(const WinogradTask& task, const WinogradBlock& block, int64_t group,
                       int64_t panel, const float* workspace) {
  static constexpr decltype(&transform_output<T, 2, 2, kStride>) kBySize[3][3] = {
      {transform_output<T, 2, 2, kStride>, transform_output<T, 2, 3, kStride>,
       transform_output<T, 2, 4, kStride>},
      {transform_output<T, 3, 2, kStride>, transform_output<T, 3, 3, kStride>,
       transform_output<T, 3, 4, kStride>},
      {transform_output<T, 4, 2, kStride>, transform_output<T, 4, 3, kStride>,
       transform_output<T, 4, 4, kStride>}};
  const ConvShape& shape = task.conv.shape;
  const int64_t outputs = shape.group_out_channels();
  const int64_t channel = group * outputs + panel * kPanel;
  const int64_t columns = outputs - panel * kPanel < kPanel ? outputs - panel * kPanel : kPanel;
  const Finish<T> finish{task.conv.shift + channel,
                         static_cast<const T*>(task.conv.residual),
                         static_cast<T*>(task.conv.output),
                         columns,
                         task.conv.act,
                         task.conv.negative_slope};
  for (int64_t t = 0; t < block.count; ++t) {
    const WinogradTile& tile = block.tiles[t];
    const float* entries[kWinogradMostEntries];
    for (int64_t n = 0; n < tile.entries; ++n) {
      entries[n] = workspace + block.products[tile.weight[n]] + tile.row[n] * kPanel;
    }
    const int64_t below = shape.out_height - tile.y, beside = shape.out_width - tile.x;
    const OutputPlace place{
        ((tile.image * shape.out_height + tile.y) * shape.out_width + tile.x) * shape.out_channels +
            channel,
        shape.out_width * shape.out_channels, shape.out_channels,
        below < tile.height ? below : tile.height, beside < tile.width ? beside : tile.width};
    if (!kBySize[tile.height - 2][tile.width - 2](entries, finish, place)) {
      const auto again = task.plain.is_bf16 ? convolve_tile<T, bf16> : convolve_tile<T, float>;
      again(task, tile, group, channel, finish, place);
    }
  }
}

template <class T, class Element, int kStride>
void winograd_kernel(const WinogradTask& task, int64_t first, int64_t count, int64_t group,
                     int64_t begin, int64_t end, float* workspace, const void* zeros) {
  WinogradBlock block;
  cut_block(task, first, count, block);
  transform_inputs<T, Element, kStride>(task, block, group, workspace,
                                        static_cast<const T*>(zeros));
  const int64_t weights = task.weights();
  for (int64_t panel = begin; panel < end; ++panel) {
    // Meanwhile the lines that the output will be written to come in, a few tiles at a time.
    const auto between = [&](int64_t w) {
      const int64_t expected = block.count * (w + 1) / weights;
      for (int64_t t = block.count * w / weights; t < expected; ++t) {
        expect_tile<T>(task, block.tiles[t], group, panel);
      }
    };
    multiply_panel<Element, kStride>(task, block, group, panel, workspace, between);
    transform_outputs<T, kStride>(task, block, group, panel, workspace);
  }
}

// Null where this instruction set cannot multiply pairs.
inline WinogradKernel winograd_kernel_for(const WinogradTask& task) {
  const bool strided = task.stride() == 2;
  if (task.conv.pairs) {
#if RESNET_FUSED_BF16_INSTRUCTIONS
    return strided ? winograd_kernel<bf16, Bf16Pairs, 2> : winograd_kernel<bf16, Bf16Pairs, 1>;
#else
    return nullptr;
#endif
  }
  if (task.conv.is_bf16) {
    return strided ? winograd_kernel<bf16, Floats, 2> : winograd_kernel<bf16, Floats, 1>;
  }
  return strided ? winograd_kernel<float, Floats, 2> : winograd_kernel<float, Floats, 1>;
}
