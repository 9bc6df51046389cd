// How a block is cut into tiles, and their inputs transformed: V = B^T d B.
// Included inside the namespace of one instruction set (for_each_isa.h), after gemm_kernel.h.

#include "winograd_transform.h"

// Which of the convolution's weights the numbers of a line meet: the first finite points and
// infinity, which a largest tile has as its last one. With stride 2 these are the even inputs'; the
// odd inputs' weight follows, `outputs` times.
DEVICE_INLINE int64_t weight_of(const WinogradTask& task, int64_t outputs, int64_t i) {
  const bool strided = task.stride() == 2;
  const int64_t finite = strided ? outputs : outputs + 1;
  const int64_t infinity = strided ? task.largest : task.largest + 1;
  return i < finite ? i : i == finite ? infinity : task.largest + 1;
}

// Inputs of a line of a tile, and numbers they become.
DEVICE_INLINE int64_t line_size(const WinogradTask& task, int64_t outputs) {
  return task.stride() == 2 ? 2 * outputs + 1 : outputs + 2;
}

struct WinogradTile {
  int64_t image, y, x;  // of its first output
  int64_t height, width;
  int64_t entries;
  int8_t weight[kWinogradMostEntries];  // that each of its numbers meets
  int16_t row[kWinogradMostEntries];    // and the row there
};

struct WinogradBlock {
  WinogradTile tiles[kWinogradLargestBlock];
  int64_t count;
  int64_t rows[kWinogradMostWeights];
  int64_t inputs[kWinogradMostWeights];  // where each weight's matrices begin in the workspace
  int64_t products[kWinogradMostWeights];
};

inline void cut_block(const WinogradTask& task, int64_t first, int64_t count,
                      WinogradBlock& block) {
  const WinogradTiles vertical{task.conv.shape.out_height, task.largest};
  const WinogradTiles horizontal{task.conv.shape.out_width, task.largest};
  const int64_t across = horizontal.count(), per_image = vertical.count() * across;
  block.count = count;
  int64_t offset = 0;
  for (int64_t w = 0; w < task.weights(); ++w) {
    block.rows[w] = 0;
    block.inputs[w] = offset;
    offset += task.input_slice(w);
  }
  for (int64_t w = 0; w < task.weights(); ++w) {
    block.products[w] = offset;
    offset += task.product_slice(w);
  }
  for (int64_t t = 0; t < count; ++t) {
    WinogradTile& tile = block.tiles[t];
    const int64_t index = (first + t) % per_image;
    tile.image = (first + t) / per_image;
    tile.y = vertical.start(index / across);
    tile.x = horizontal.start(index % across);
    tile.height = vertical.size(index / across);
    tile.width = horizontal.size(index % across);
    tile.entries = 0;
    for (int64_t i = 0; i < line_size(task, tile.height); ++i) {
      const int64_t above = weight_of(task, tile.height, i) * task.weights_along();
      for (int64_t j = 0; j < line_size(task, tile.width); ++j) {
        const int64_t w = above + weight_of(task, tile.width, j);
        tile.weight[tile.entries] = static_cast<int8_t>(w);
        tile.row[tile.entries++] = static_cast<int16_t>(block.rows[w]++);
      }
    }
  }
}

// ---- input transform ---------------------------------------------------------------------------

struct EntryPlace {
  float* data;
  int64_t chunk_stride;
};

// The two-dimensional transform of 16 channels, a line after the other: Column and Row say what
// becomes of kIn numbers. `chunk` counts the channels in the transformed data.
template <class T, class Element, class Column, class Row>
void transform_chunk(const T* const* pixels, int64_t channel, const EntryPlace* entries,
                     int64_t chunk) {
  for (int lane = 0; lane < 16; lane += kLanes) {
    Vector half[Row::kIn][Column::kOut];
#pragma GCC unroll 9
    for (int x = 0; x < Row::kIn; ++x) {
      Vector d[Column::kIn];
#pragma GCC unroll 9
      for (int y = 0; y < Column::kIn; ++y) d[y] = load(pixels[y * Row::kIn + x] + channel + lane);
      Column::apply(d, half[x]);
    }
#pragma GCC unroll 9
    for (int y = 0; y < Column::kOut; ++y) {
      Vector d[Row::kIn], v[Row::kOut];
#pragma GCC unroll 9
      for (int x = 0; x < Row::kIn; ++x) d[x] = half[x][y];
      Row::apply(d, v);
#pragma GCC unroll 9
      for (int x = 0; x < Row::kOut; ++x) {
        const EntryPlace& entry = entries[y * Row::kOut + x];
        Element::store_words(entry.data + chunk / Element::kPerWord * entry.chunk_stride +
                                 (chunk % Element::kPerWord * 16 + lane) / Element::kPerWord,
                             v[x]);
      }
    }
  }
}

template <class T, class Element, class Column, class Row>
void transform_tile(const T* const* pixels, int64_t channels, const EntryPlace* entries) {
  constexpr int kPixels = Column::kIn * Row::kIn;
  const int64_t whole = channels / 16;
  for (int64_t chunk = 0; chunk < whole; ++chunk) {
    transform_chunk<T, Element, Column, Row>(pixels, chunk * 16, entries, chunk);
  }
  if (channels % 16 == 0) return;
  T rest[kPixels][16] = {};
  const T* pointers[kPixels];
  for (int i = 0; i < kPixels; ++i) {
    pointers[i] = rest[i];
    for (int64_t c = 0; c < channels % 16; ++c) rest[i][c] = pixels[i][whole * 16 + c];
  }
  transform_chunk<T, Element, Column, Row>(pointers, 0, entries, whole);
}

// The transforms of tiles of 2 to 4 outputs along each side, as kBySize[height - 2][width - 2].
template <class T, class Element, template <int, int> class LineOf, int kStride>
struct TileTransforms {
  static constexpr decltype(&transform_tile<T, Element, LineOf<2, kStride>, LineOf<2, kStride>>)
      kBySize[3][3] = {{transform_tile<T, Element, LineOf<2, kStride>, LineOf<2, kStride>>,
                        transform_tile<T, Element, LineOf<2, kStride>, LineOf<3, kStride>>,
                        transform_tile<T, Element, LineOf<2, kStride>, LineOf<4, kStride>>},
                       {transform_tile<T, Element, LineOf<3, kStride>, LineOf<2, kStride>>,
                        transform_tile<T, Element, LineOf<3, kStride>, LineOf<3, kStride>>,
                        transform_tile<T, Element, LineOf<3, kStride>, LineOf<4, kStride>>},
                       {transform_tile<T, Element, LineOf<4, kStride>, LineOf<2, kStride>>,
                        transform_tile<T, Element, LineOf<4, kStride>, LineOf<3, kStride>>,
                        transform_tile<T, Element, LineOf<4, kStride>, LineOf<4, kStride>>}};
};

// Where a tile's pixels lie; outside of the image they are zero.
template <class T>
void locate_pixels(const WinogradTask& task, const WinogradTile& tile, int64_t group,
                   const T* zeros, const T** pixels) {
  const ConvShape& shape = task.conv.shape;
  for (int64_t i = 0, n = 0; i < line_size(task, tile.height); ++i) {
    const int64_t y = tile.y * task.stride() + i - shape.padding[0];
    const bool row_inside = y >= 0 && y < shape.height;
    const T* row = static_cast<const T*>(task.conv.input) +
                   (tile.image * shape.height + y) * shape.width * shape.channels +
                   group * shape.group_channels();
    for (int64_t j = 0; j < line_size(task, tile.width); ++j, ++n) {
      const int64_t x = tile.x * task.stride() + j - shape.padding[1];
      const bool inside = row_inside && x >= 0 && x < shape.width;
      pixels[n] = inside ? row + x * shape.channels : zeros;
    }
  }
}

template <class T, class Element, int kStride>
void transform_inputs(const WinogradTask& task, const WinogradBlock& block, int64_t group,
                      float* workspace, const T* zeros) {
  for (int64_t t = 0; t < block.count; ++t) {
    const WinogradTile& tile = block.tiles[t];
    const T* pixels[kWinogradMostEntries];
    locate_pixels(task, tile, group, zeros, pixels);
    EntryPlace entries[kWinogradMostEntries];
    for (int64_t n = 0; n < tile.entries; ++n) {
      const int64_t w = tile.weight[n];
      entries[n] = {workspace + block.inputs[w] + tile.row[n] * 16, block.rows[w] * 16};
    }
    TileTransforms<T, Element, InputLine, kStride>::kBySize[tile.height - 2][tile.width - 2](
        pixels, task.conv.shape.group_channels(), entries);
  }
}
