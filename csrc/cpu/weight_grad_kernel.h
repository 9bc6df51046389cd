// Preparing blocks, multiplying them, and storing the taps' gradients.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "gemm_kernel.h"
#include "winograd_tiles.h"
#include "winograd_grad_transform.h"
#include "transpose.h"

// Rows of each point's matrix, for tiles [first, first + count).
inline void count_tile_rows(const ConvShape& shape, int64_t first, int64_t count, int64_t* rows) {
  WinogradTask winograd{};
  winograd.conv.shape = shape;
  winograd.largest = 4;
  WinogradBlock tiles;
  cut_block(winograd, first, count, tiles);
  for (int64_t w = 0; w < winograd.weights(); ++w) rows[w] = tiles.rows[w];
}

// ---- Winograd: both sides of every tile transformed --------------------------------------------

template <class T>
void locate_grads(const WinogradTask& task, const WinogradTile& tile, const T* grad, const T* zeros,
                  const T** pixels) {
  const ConvShape& shape = task.conv.shape;
  for (int64_t i = 0, n = 0; i < tile.height; ++i) {
    for (int64_t j = 0; j < tile.width; ++j, ++n) {
      const int64_t y = tile.y + i, x = tile.x + j;
      pixels[n] = y < shape.out_height && x < shape.out_width
                      ? grad + ((tile.image * shape.out_height + y) * shape.out_width + x) *
                                   shape.out_channels
                      : zeros;
    }
  }
}

template <class T, int kStride>
void transform_grad_tiles(const WeightGradTask& task, const WeightGradBlock& block, int64_t begin,
                          int64_t end) {
  WinogradTask winograd{};
  winograd.conv.shape = task.shape;
  winograd.conv.input = task.input;
  winograd.largest = 4;
  WinogradBlock tiles;
  cut_block(winograd, block.first, block.count, tiles);
  const T* const zeros = static_cast<const T*>(task.zeros);
  const T* pixels[kWinogradMostEntries];
  EntryPlace places[kWinogradMostEntries];
  for (int64_t t = begin; t < end; ++t) {
    const WinogradTile& tile = tiles.tiles[t];
    const int64_t h = tile.height - 2, w = tile.width - 2;
    for (int64_t n = 0; n < tile.entries; ++n) {
      const GradMatrix& m = block.matrices[tile.weight[n]];
      places[n] = {task.workspace + m.b + tile.row[n] * 16, m.b_stride};
    }
    locate_pixels(winograd, tile, 0, zeros, pixels);
    TileTransforms<T, Floats, InputLine, kStride>::kBySize[h][w](pixels, task.shape.channels,
                                                                 places);
    for (int64_t n = 0; n < tile.entries; ++n) {
      const GradMatrix& m = block.matrices[tile.weight[n]];
      places[n] = {task.workspace + m.a + tile.row[n] * 16, m.a_stride};
    }
    locate_grads(winograd, tile, static_cast<const T*>(task.grad), zeros, pixels);
    TileTransforms<T, Floats, OutputGradLine, kStride>::kBySize[h][w](
        pixels, task.shape.out_channels, places);
  }
}

// ---- otherwise: pixels copied, for each tap those that it reads --------------------------------

// `count` numbers to 16s `stride` floats apart, the last ones padded with zeros.
template <class T>
void copy_chunks(const T* from, int64_t count, float* to, int64_t stride) {
  for (; count >= 16; count -= 16, from += 16, to += stride) {
    for (int lane = 0; lane < 16; lane += kLanes) store(to + lane, load(from + lane));
  }
  if (count == 0) return;
  for (int64_t i = 0; i < 16; ++i) to[i] = i < count ? as_float(from[i]) : 0.0f;
}

// All taps' channels of one output pixel side by side: [row of the kernel][column][channel].
template <class T>
void gather_taps(const WeightGradTask& task, const T* image, int64_t y, int64_t x, float* line) {
  const ConvShape& s = task.shape;
  const T* const end =
      static_cast<const T*>(task.input) + s.batch * s.height * s.width * s.channels;
  const int64_t first = x * s.stride[1] - s.padding[1], width = s.kernel[1] * s.channels;
  const bool inside = s.dilation[1] == 1 && first >= 0 && first + s.kernel[1] <= s.width;
  for (int64_t r = 0; r < s.kernel[0]; ++r, line += width) {
    const int64_t from_y = y * s.stride[0] - s.padding[0] + r * s.dilation[0];
    if (from_y < 0 || from_y >= s.height) {
      for (int64_t i = 0; i < width; ++i) line[i] = 0.0f;
      continue;
    }
    const T* const row = image + from_y * s.width * s.channels;
    const T* const from = row + first * s.channels;
    if (inside && from + width + kLanes <= end) {
      // Whole vectors: what is too much, the next row overwrites.
      for (int64_t i = 0; i < width; i += kLanes) store(line + i, load(from + i));
      continue;
    }
    for (int64_t c = 0; c < s.kernel[1]; ++c) {
      const int64_t from_x = first + c * s.dilation[1];
      const bool is_there = from_x >= 0 && from_x < s.width;
      for (int64_t i = 0; i < s.channels; ++i) {
        line[c * s.channels + i] = is_there ? as_float(row[from_x * s.channels + i]) : 0.0f;
      }
    }
  }
}

template <class T>
void copy_grad_pixels(const WeightGradTask& task, const WeightGradBlock& block, int64_t begin,
                      int64_t end) {
  const ConvShape& s = task.shape;
  const T* const zeros = static_cast<const T*>(task.zeros);
  const GradMatrix& a = block.matrices[0];
  // Some pixels at a time: a load of what several stores have just written would wait for them.
  constexpr int64_t kPixels = 8;
  float lines[kPixels][kMostJoined + 16];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t pixel = block.first + row;
    const int64_t x = pixel % s.out_width, y = pixel / s.out_width % s.out_height;
    const T* const image = static_cast<const T*>(task.input) +
                           pixel / (s.out_width * s.out_height) * s.height * s.width * s.channels;
    copy_chunks(static_cast<const T*>(task.grad) + pixel * s.out_channels, s.out_channels,
                task.workspace + a.a + row * 16, a.a_stride);
    if (task.joins_taps()) {
      const int64_t waiting = (row - begin) % kPixels;
      gather_taps(task, image, y, x, lines[waiting]);
      if (waiting + 1 < kPixels && row + 1 < end) continue;
      for (int64_t i = 0; i <= waiting; ++i) {
        copy_chunks(lines[i], task.columns, task.workspace + a.b + (row - waiting + i) * 16,
                    a.b_stride);
      }
      continue;
    }
    for (int64_t r = 0; r < s.kernel[0]; ++r) {
      const int64_t from_y = y * s.stride[0] - s.padding[0] + r * s.dilation[0];
      for (int64_t c = 0; c < s.kernel[1]; ++c) {
        const int64_t from_x = x * s.stride[1] - s.padding[1] + c * s.dilation[1];
        const bool inside = from_y >= 0 && from_y < s.height && from_x >= 0 && from_x < s.width;
        const GradMatrix& m = block.matrices[r * s.kernel[1] + c];
        copy_chunks(inside ? image + (from_y * s.width + from_x) * s.channels : zeros, s.channels,
                    task.workspace + m.b + row * 16, m.b_stride);
      }
    }
  }
}

// ---- products ----------------------------------------------------------------------------------

constexpr int kGradRows = kLanes == 16 ? 8 : 4;

// sums[kGradRows][32] (+)= a^T b over `rows` rows, in a sum of their own: the error grows with the
// length of a chain. b's second 16 columns lie `second` floats after the first.
// `ahead` are rows of 16 that are needed next.
struct GradAhead {
  const float* a;
  const float* b;
};

inline void add_products(const float* a, const float* b, int64_t second, int64_t rows, bool adds,
                         GradAhead ahead, float* sums) {
  for (int column = 0; column < kPanel; column += 2 * kLanes) {
    Vector sum[kGradRows][2] = {};
    const float* b0 = b + column / 16 * second + column % 16;
    const float* b1 = b + (column + kLanes) / 16 * second + (column + kLanes) % 16;
    const float* from = a;
#pragma GCC unroll 1
    for (int64_t i = 0; i < rows; ++i) {
      const Vector v0 = load(b0), v1 = load(b1);
#pragma GCC unroll 8
      for (int r = 0; r < kGradRows; ++r) {
        const Vector value = all(from[r]);
        sum[r][0] += value * v0;
        sum[r][1] += value * v1;
      }
      b0 += 16, b1 += 16, from += 16;
      __builtin_prefetch(ahead.a), ahead.a += 16;
      __builtin_prefetch(ahead.b), ahead.b += 16;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kGradRows; ++r) {
      float* const to = sums + r * kPanel + column;
      store(to, adds ? load(to) + sum[r][0] : sum[r][0]);
      store(to + kLanes, adds ? load(to + kLanes) + sum[r][1] : sum[r][1]);
    }
  }
}

inline void multiply_grads(const WeightGradTask& task, const std::vector<WeightGradBlock>& blocks,
                           const GradUnit& unit) {
  const bool is_half = (unit.panel * kPanel + 16) >= task.columns;
  for (int64_t m = 0; m < task.matrices; ++m) {
    float* const sums = unit.sums + m * unit.chunks * 16 * kPanel;
    bool adds = unit.adds;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const GradMatrix& matrix = blocks[i].matrices[m];
      const bool is_last = i + 1 == blocks.size();
      const GradMatrix& next = !is_last                ? blocks[i + 1].matrices[m]
                               : m + 1 < task.matrices ? blocks[0].matrices[m + 1]
                                                       : matrix;
      const float* const b = task.workspace + matrix.b + unit.panel * 2 * matrix.b_stride;
      const float* const next_b = task.workspace + next.b + unit.panel * 2 * next.b_stride;
      for (int64_t chunk = 0; chunk < unit.chunks; ++chunk) {
        const float* const a = task.workspace + matrix.a + (unit.chunk + chunk) * matrix.a_stride;
        const float* const next_a = chunk + 1 < unit.chunks
                                        ? a + matrix.a_stride
                                        : task.workspace + next.a + unit.chunk * next.a_stride;
        for (int row = 0; row < 16; row += kGradRows) {
          // The first passes bring in what comes next, one line a row.
          const int64_t pass = (chunk * 16 + row) / kGradRows;
          const GradAhead ahead{row == 0 ? next_a : a,
                                pass < 2 ? next_b + pass * next.b_stride : b};
          add_products(a + row, b, is_half ? 0 : matrix.b_stride, matrix.rows, adds, ahead,
                       sums + (chunk * 16 + row) * kPanel);
        }
      }
      adds = true;
    }
  }
}

// ---- the taps' gradients -----------------------------------------------------------------------

// Past the caches, where they go to whole lines: a gradient is read again a step later.
DEVICE_INLINE void stream(float* to, Vector value) {
#if RESNET_FUSED_VECTOR_BYTES == 64
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    return _mm512_stream_ps(to, bits_as<__m512>(value));
  }
#endif
  store(to, value);
}
DEVICE_INLINE void finish_streams() {
#if RESNET_FUSED_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

// 32 c's of one k and one tap.
DEVICE_INLINE void store_taps(const float* values, int64_t count, float* to, int64_t stride) {
  if (stride == 1 && count == kPanel) {
    for (int lane = 0; lane < kPanel; lane += kLanes) stream(to + lane, load(values + lane));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = values[i];
  }
}

inline int64_t tap_offset(const WeightView& w, int64_t tap) {
  return tap / w.kernel[1] * w.tap_stride[0] + tap % w.kernel[1] * w.tap_stride[1];
}

DEVICE_INLINE bool is_zero(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  bool zero = true;
  for (int i = 0; i < kLanes; ++i) zero &= lanes[i] == 0.0f;
  return zero;
}

template <int kStride>
bool store_winograd_grads(const WeightGradTask& task, const GradUnit& unit, const WeightView& to) {
  const int64_t point = unit.chunks * 16 * kPanel;
  const int64_t first = unit.panel * kPanel;
  const int64_t count = task.columns - first < kPanel ? task.columns - first : kPanel;
  float* const data = const_cast<float*>(to.data);
  Vector check{};  // NaN where one is not finite
  for (int64_t row = 0; row < unit.chunks * 16; ++row) {
    const int64_t k = unit.chunk * 16 + row;
    if (k >= task.shape.out_channels) break;
    float taps[9][kPanel];
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* const sums = unit.sums + row * kPanel + lane;
      Vector half[6][3];
#pragma GCC unroll 6
      for (int y = 0; y < 6; ++y) {
        Vector u[6];
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) u[x] = load(sums + (y * 6 + x) * point);
        gather_tap_grads<kStride>(u, half[y]);
      }
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        Vector u[6], g[3];
#pragma GCC unroll 6
        for (int y = 0; y < 6; ++y) u[y] = half[y][x];
        gather_tap_grads<kStride>(u, g);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          store(taps[y * 3 + x] + lane, g[y]);
          check += g[y] * 0.0f;
        }
      }
    }
    for (int64_t t = 0; t < 9; ++t) {
      store_taps(taps[t], count,
                 data + k * to.output_stride + first * to.input_stride + tap_offset(to, t),
                 to.input_stride);
    }
  }
  finish_streams();
  return is_zero(check);
}

inline bool store_grads(const WeightGradTask& task, const GradUnit& unit, const WeightView& to) {
  const int64_t first = unit.panel * kPanel;
  const int64_t count = task.columns - first < kPanel ? task.columns - first : kPanel;
  float* const data = const_cast<float*>(to.data);
  Vector check{};
  for (int64_t m = 0; m < task.matrices; ++m) {
    for (int64_t row = 0; row < unit.chunks * 16; ++row) {
      const int64_t k = unit.chunk * 16 + row;
      if (k >= task.shape.out_channels) break;
      const float* const values = unit.sums + (m * unit.chunks * 16 + row) * kPanel;
      for (int lane = 0; lane < kPanel; lane += kLanes) {
        if (lane < count) check += load(values + lane) * 0.0f;
      }
      float* const own = data + k * to.output_stride;
      if (!task.joins_taps()) {
        store_taps(values, count, own + first * to.input_stride + tap_offset(to, m),
                   to.input_stride);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t column = first + i;
        own[column % task.shape.channels * to.input_stride +
            tap_offset(to, column / task.shape.channels)] = values[i];
      }
    }
  }
  finish_streams();
  return is_zero(check);
}

inline GradPrepareKernel grad_prepare_kernel(const WeightGradTask& task) {
  if (!task.winograd) return task.is_bf16 ? copy_grad_pixels<bf16> : copy_grad_pixels<float>;
  if (task.shape.stride[0] == 2) {
    return task.is_bf16 ? transform_grad_tiles<bf16, 2> : transform_grad_tiles<float, 2>;
  }
  return task.is_bf16 ? transform_grad_tiles<bf16, 1> : transform_grad_tiles<float, 1>;
}
inline GradMultiplyKernel grad_multiply_kernel() {
  return multiply_grads;
}
inline GradStoreKernel grad_store_kernel(const WeightGradTask& task) {
  if (!task.winograd) return store_grads;
  return task.shape.stride[0] == 2 ? store_winograd_grads<2> : store_winograd_grads<1>;
}
