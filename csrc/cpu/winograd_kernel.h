// One block of tiles: V = B^T d B per tile, M_p = V_p U_p per point, y = A^T M A per tile.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "gemm_kernel.h"
#include "winograd_transform.h"

// Which of the convolution's points a tile uses, along one dimension.
constexpr int8_t kPointsOf[3][6] = {{0, 1, 2, 5, 0, 0}, {0, 1, 2, 3, 5, 0}, {0, 1, 2, 3, 4, 5}};

DEVICE_INLINE int64_t point_of(int64_t largest, int64_t size, int64_t i) {
  return largest == 2 ? i : kPointsOf[size - 2][i];
}

struct WinogradTile {
  int64_t image, y, x;  // of its first output
  int64_t height, width;
  int16_t row[kWinogradMostPoints];  // of its data in each point's matrix
};

struct WinogradBlock {
  WinogradTile tiles[kWinogradLargestBlock];
  int64_t count;
  int64_t rows[kWinogradMostPoints];
};

inline void cut_block(const WinogradTask& task, int64_t first, int64_t count,
                      WinogradBlock& block) {
  const WinogradTiles vertical{task.conv.shape.out_height, task.largest};
  const WinogradTiles horizontal{task.conv.shape.out_width, task.largest};
  const int64_t across = horizontal.count(), per_image = vertical.count() * across;
  const int64_t along = task.points_along();
  block.count = count;
  for (int64_t p = 0; p < task.points(); ++p) block.rows[p] = 0;
  for (int64_t t = 0; t < count; ++t) {
    WinogradTile& tile = block.tiles[t];
    const int64_t index = (first + t) % per_image;
    tile.image = (first + t) / per_image;
    tile.y = vertical.start(index / across);
    tile.x = horizontal.start(index % across);
    tile.height = vertical.size(index / across);
    tile.width = horizontal.size(index % across);
    for (int64_t i = 0; i < tile.height + 2; ++i) {
      for (int64_t j = 0; j < tile.width + 2; ++j) {
        const int64_t p =
            point_of(task.largest, tile.height, i) * along + point_of(task.largest, tile.width, j);
        tile.row[p] = static_cast<int16_t>(block.rows[p]++);
      }
    }
  }
}

// ---- input -------------------------------------------------------------------------------------

struct PointRow {
  float* data;
  int64_t chunk_stride;
};

template <int kHeight, int kWidth>
void transform_input_chunk(const float* const* pixels, int64_t channel, const PointRow* points,
                           int64_t chunk) {
  for (int lane = 0; lane < 16; lane += kLanes) {
    Vector half[kWidth + 2][kHeight + 2];
#pragma GCC unroll 6
    for (int x = 0; x < kWidth + 2; ++x) {
      Vector d[kHeight + 2];
#pragma GCC unroll 6
      for (int y = 0; y < kHeight + 2; ++y) {
        d[y] = load(pixels[y * (kWidth + 2) + x] + channel + lane);
      }
      Transform<kHeight>::input(d, half[x]);
    }
#pragma GCC unroll 6
    for (int y = 0; y < kHeight + 2; ++y) {
      Vector d[kWidth + 2], v[kWidth + 2];
#pragma GCC unroll 6
      for (int x = 0; x < kWidth + 2; ++x) d[x] = half[x][y];
      Transform<kWidth>::input(d, v);
#pragma GCC unroll 6
      for (int x = 0; x < kWidth + 2; ++x) {
        const PointRow& point = points[y * (kWidth + 2) + x];
        store(point.data + chunk * point.chunk_stride + lane, v[x]);
      }
    }
  }
}

template <int kHeight, int kWidth>
void transform_input(const float* const* pixels, int64_t channels, const PointRow* points) {
  constexpr int kPixels = (kHeight + 2) * (kWidth + 2);
  const int64_t whole = channels / 16;
  for (int64_t chunk = 0; chunk < whole; ++chunk) {
    transform_input_chunk<kHeight, kWidth>(pixels, chunk * 16, points, chunk);
  }
  if (channels % 16 == 0) return;
  float rest[kPixels][16] = {};
  const float* pointers[kPixels];
  for (int i = 0; i < kPixels; ++i) {
    pointers[i] = rest[i];
    for (int64_t c = 0; c < channels % 16; ++c) rest[i][c] = pixels[i][whole * 16 + c];
  }
  transform_input_chunk<kHeight, kWidth>(pointers, 0, points, whole);
}

// Where a tile's pixels lie; outside of the image they are zero.
inline void locate_pixels(const WinogradTask& task, const WinogradTile& tile, int64_t group,
                          const float* zeros, const float** pixels) {
  const ConvShape& shape = task.conv.shape;
  for (int64_t i = 0, n = 0; i < tile.height + 2; ++i) {
    const int64_t y = tile.y + i - shape.padding[0];
    const bool row_inside = y >= 0 && y < shape.height;
    const float* row = task.conv.input +
                       (tile.image * shape.height + y) * shape.width * shape.channels +
                       group * shape.group_channels();
    for (int64_t j = 0; j < tile.width + 2; ++j, ++n) {
      const int64_t x = tile.x + j - shape.padding[1];
      const bool inside = row_inside && x >= 0 && x < shape.width;
      pixels[n] = inside ? row + x * shape.channels : zeros;
    }
  }
}

inline void transform_inputs(const WinogradTask& task, const WinogradBlock& block, int64_t group,
                             float* transformed, const float* zeros) {
  constexpr decltype(&transform_input<2, 2>) kBySize[3][3] = {
      {transform_input<2, 2>, transform_input<2, 3>, transform_input<2, 4>},
      {transform_input<3, 2>, transform_input<3, 3>, transform_input<3, 4>},
      {transform_input<4, 2>, transform_input<4, 3>, transform_input<4, 4>}};
  const ConvShape& shape = task.conv.shape;
  const int64_t channels = shape.group_channels(), along = task.points_along();
  for (int64_t t = 0; t < block.count; ++t) {
    const WinogradTile& tile = block.tiles[t];
    const float* pixels[kWinogradMostPoints];
    locate_pixels(task, tile, group, zeros, pixels);
    PointRow points[kWinogradMostPoints];
    for (int64_t i = 0, n = 0; i < tile.height + 2; ++i) {
      for (int64_t j = 0; j < tile.width + 2; ++j, ++n) {
        const int64_t p =
            point_of(task.largest, tile.height, i) * along + point_of(task.largest, tile.width, j);
        points[n] = {transformed + p * task.input_slice() + tile.row[p] * 16, block.rows[p] * 16};
      }
    }
    kBySize[tile.height - 2][tile.width - 2](pixels, channels, points);
  }
}

// ---- products ----------------------------------------------------------------------------------

template <int... kRows>
struct GemmTable {
  static constexpr decltype(&gemm_to_memory<1>) kByRows[] = {gemm_to_memory<kRows>...};
};
#if RESNET_FUSED_VECTOR_BYTES == 64
using Gemms = GemmTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using Gemms = GemmTable<1, 2, 3, 4, 5, 6>;
#endif

inline void multiply_point(const float* transformed, int64_t rows, const float* weights,
                           int64_t depth, float* products) {
  const int64_t parts = (rows + kGemmRows - 1) / kGemmRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    const float* first = transformed + begin * 16;
    const ReadAhead ahead{part < 2 ? weights + depth * kPanel + part * 16 : weights,
                          part < 2 ? kPanel : 0};
    Gemms::kByRows[end - begin - 1]({first, first + kHalf * 16, 16, rows * 16}, weights, depth,
                                    ahead, products + begin * kPanel);
  }
}

// ---- output ------------------------------------------------------------------------------------

// One tile's outputs, [kHeight][kWidth][32]. `check` becomes NaN where one of them is not finite.
template <int kHeight, int kWidth>
DEVICE_INLINE void transform_products(const float* const* products, int lane, Vector& check,
                                      Vector (&y)[kHeight][kWidth]) {
  Vector half[kWidth + 2][kHeight];
#pragma GCC unroll 6
  for (int x = 0; x < kWidth + 2; ++x) {
    Vector m[kHeight + 2];
#pragma GCC unroll 6
    for (int i = 0; i < kHeight + 2; ++i) m[i] = load(products[i * (kWidth + 2) + x] + lane);
    Transform<kHeight>::output(m, half[x]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
    Vector m[kWidth + 2];
#pragma GCC unroll 6
    for (int x = 0; x < kWidth + 2; ++x) m[x] = half[x][i];
    Transform<kWidth>::output(m, y[i]);
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

template <int kHeight, int kWidth>
bool transform_output(const float* const* products, const Finish& finish,
                      const OutputPlace& place) {
  Vector check{};
  float sums[kHeight * kWidth][kPanel];
  const bool direct = in_registers(finish) && place.height == kHeight && place.width == kWidth;
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    Vector y[kHeight][kWidth];
    transform_products<kHeight, kWidth>(products, lane, check, y);
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
inline void convolve_tile(const WinogradTask& task, const WinogradTile& tile, int64_t group,
                          int64_t channel, const Finish& finish, const OutputPlace& place) {
  const ConvShape& shape = task.conv.shape;
  const int64_t channels = shape.group_channels();
  for (int64_t i = 0; i < place.height; ++i) {
    for (int64_t j = 0; j < place.width; ++j) {
      float sums[kPanel] = {};
      for (int64_t n = 0; n < finish.columns; ++n) {
        float sum = 0;
        for (int64_t r = 0; r < 3; ++r) {
          const int64_t y = tile.y + i + r - shape.padding[0];
          for (int64_t s = 0; s < 3; ++s) {
            const int64_t x = tile.x + j + s - shape.padding[1];
            if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
            const float* pixel =
                task.conv.input +
                ((tile.image * shape.height + y) * shape.width + x) * shape.channels +
                group * channels;
            const float* weight = task.weight + (channel + n) * task.weight_strides[0] +
                                  r * task.weight_strides[2] + s * task.weight_strides[3];
            for (int64_t c = 0; c < channels; ++c)
              sum += pixel[c] * weight[c * task.weight_strides[1]];
          }
        }
        sums[n] = task.scale == nullptr ? sum : sum * task.scale[channel + n];
      }
      finish_row(finish, place.offset + i * place.row_stride + j * place.pixel_stride, sums);
    }
  }
}

// Brings in the lines that a tile will write, and those of its residual.
inline void expect_tile(const WinogradTask& task, const WinogradTile& tile, int64_t group,
                        int64_t panel) {
  const ConvShape& shape = task.conv.shape;
  const int64_t channel = group * shape.group_out_channels() + panel * kPanel;
  for (int64_t i = 0; i < tile.height && tile.y + i < shape.out_height; ++i) {
    for (int64_t j = 0; j < tile.width && tile.x + j < shape.out_width; ++j) {
      const int64_t offset =
          ((tile.image * shape.out_height + tile.y + i) * shape.out_width + tile.x + j) *
              shape.out_channels +
          channel;
      for (int64_t c = 0; c < kPanel; c += 16) {
        if (task.conv.residual != nullptr) __builtin_prefetch(task.conv.residual + offset + c);
        __builtin_prefetch(task.conv.output + offset + c, 1);
      }
    }
  }
}

inline void transform_outputs(const WinogradTask& task, const WinogradBlock& block, int64_t group,
                              int64_t panel, const float* products) {
  constexpr decltype(&transform_output<2, 2>) kBySize[3][3] = {
      {transform_output<2, 2>, transform_output<2, 3>, transform_output<2, 4>},
      {transform_output<3, 2>, transform_output<3, 3>, transform_output<3, 4>},
      {transform_output<4, 2>, transform_output<4, 3>, transform_output<4, 4>}};
  const ConvShape& shape = task.conv.shape;
  const int64_t outputs = shape.group_out_channels(), along = task.points_along();
  const int64_t channel = group * outputs + panel * kPanel;
  const int64_t columns = outputs - panel * kPanel < kPanel ? outputs - panel * kPanel : kPanel;
  const Finish finish{
      task.conv.shift + channel, task.conv.residual, task.conv.output, columns, task.conv.act,
      task.conv.negative_slope};
  for (int64_t t = 0; t < block.count; ++t) {
    const WinogradTile& tile = block.tiles[t];
    const float* points[kWinogradMostPoints];
    for (int64_t i = 0, n = 0; i < tile.height + 2; ++i) {
      for (int64_t j = 0; j < tile.width + 2; ++j, ++n) {
        const int64_t p =
            point_of(task.largest, tile.height, i) * along + point_of(task.largest, tile.width, j);
        points[n] = products + p * task.product_slice() + tile.row[p] * kPanel;
      }
    }
    const int64_t below = shape.out_height - tile.y, beside = shape.out_width - tile.x;
    const OutputPlace place{
        ((tile.image * shape.out_height + tile.y) * shape.out_width + tile.x) * shape.out_channels +
            channel,
        shape.out_width * shape.out_channels, shape.out_channels,
        below < tile.height ? below : tile.height, beside < tile.width ? beside : tile.width};
    if (!kBySize[tile.height - 2][tile.width - 2](points, finish, place)) {
      convolve_tile(task, tile, group, channel, finish, place);
    }
  }
}

inline void winograd_kernel(const WinogradTask& task, int64_t first, int64_t count, int64_t group,
                            int64_t begin, int64_t end, float* workspace, const float* zeros) {
  float* const transformed = workspace;
  float* const products = workspace + task.points() * task.input_slice();
  WinogradBlock block;
  cut_block(task, first, count, block);
  transform_inputs(task, block, group, transformed, zeros);
  const int64_t depth = task.conv.shape.group_channels();
  for (int64_t panel = begin; panel < end; ++panel) {
    const float* weights =
        task.conv.packed + (group * task.panels() + panel) * task.points() * depth * kPanel;
    for (int64_t p = 0; p < task.points(); ++p) {
      // Meanwhile the lines that the output will be written to come in, a few tiles per point.
      const int64_t expected = block.count * (p + 1) / task.points();
      for (int64_t t = block.count * p / task.points(); t < expected; ++t) {
        expect_tile(task, block.tiles[t], group, panel);
      }
      if (block.rows[p] == 0) continue;
      multiply_point(transformed + p * task.input_slice(), block.rows[p],
                     weights + p * depth * kPanel, depth, products + p * task.product_slice());
    }
    transform_outputs(task, block, group, panel, products);
  }
}

inline WinogradKernel winograd_kernel_address() {
  return winograd_kernel;
}
