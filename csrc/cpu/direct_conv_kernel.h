// One unit of work: its input copied to a band if need be, then tiles of 14 pixels x 32 channels.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "gemm_kernel.h"

template <class T>
void copy_pixel(const T* __restrict from, int64_t stride, int64_t channels, T* __restrict to) {
  if (stride == 1 && channels >= 16) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c];
  } else {
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c * stride];
  }
}

template <class T>
void clear(T* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) numbers[i] = T{};
}

// Row i of a place's inputs, pixels `spacing` numbers apart; outside of the image they are zero.
template <class T>
void copy_row(const DirectTask& task, const Place& place, int64_t group, int64_t i, int64_t spacing,
              T* row) {
  const ConvShape& shape = task.conv.shape;
  const int64_t channels = shape.group_channels(), width = task.band_size(1, place.width);
  const int64_t* stride = task.input_strides;
  const int64_t left = place.x * shape.stride[1] - shape.padding[1];
  const int64_t y = place.y * shape.stride[0] - shape.padding[0] + i * task.step(0);
  if (y < 0 || y >= shape.height) {
    clear(row, width * spacing);
    return;
  }
  const T* image = static_cast<const T*>(task.conv.input) + place.image * stride[0] +
                   group * channels * stride[1] + y * stride[2];
  // Pixels that lie side by side here and there are copied together.
  if (stride[1] == 1 && stride[3] == channels && task.step(1) == 1 && spacing == channels) {
    const int64_t before = left < 0 ? (-left < width ? -left : width) : 0;
    const int64_t room = shape.width - left < width ? shape.width - left : width;
    const int64_t inside = room > before ? room : before;
    clear(row, before * spacing);
    copy_pixel(image + (left + before) * channels, 1, (inside - before) * channels,
               row + before * spacing);
    clear(row + inside * spacing, (width - inside) * spacing);
    return;
  }
  const int64_t padded = task.windows ? channels : task.conv.group_words() * task.conv.per_word();
  for (int64_t j = 0; j < width; ++j) {
    const int64_t x = left + j * task.step(1);
    T* to = row + j * spacing;
    if (x < 0 || x >= shape.width) {
      clear(to, padded);
    } else {
      clear(to + channels, padded - channels);  // the last pair may be half a pair
      copy_pixel(image + x * stride[3], stride[1], channels, to);
    }
  }
}

// For each output pixel the numbers that a row of the kernel meets, and zeros up to a whole word.
// Whole cache lines are copied: what is written too far, the next window or nobody reads.
template <class T>
void cut_windows(const DirectTask& task, int64_t width, const T* line, T* row) {
  const ConvShape& shape = task.conv.shape;
  const int64_t channels = shape.group_channels(), size = shape.kernel[1] * channels;
  const int64_t spacing = task.band_channels * task.conv.per_word();
  const int64_t run = shape.dilation[1] == 1 ? size : channels;
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  for (int64_t j = 0; j < width; ++j) {
    const T* from = line + j * (shape.stride[1] / task.step(1)) * channels;
    T* const to = row + j * spacing;
    for (int64_t n = 0; n < size; n += run, from += shape.dilation[1] * channels) {
      for (int64_t i = 0; i < run; i += kLine) std::memcpy(to + n + i, from + i, kCacheLine);
    }
    clear(to + size, spacing - size);
  }
}

inline bool all_finite(const bf16* numbers, int64_t count) {
  uint16_t largest = 0;  // exponent
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t exponent = numbers[i].bits & 0x7F80;
    largest = largest < exponent ? exponent : largest;
  }
  return largest != 0x7F80;
}

// False if windows overlap and not all numbers are finite: a window's last pair may then be one
// number and, times zero, a stranger that turns the sum into NaN.
template <class T>
bool copy_band(const DirectTask& task, const Place& place, int64_t group, float* band) {
  const int64_t height = task.band_size(0, place.height);
  T* const line = reinterpret_cast<T*>(band + task.band() - task.line()) + kCacheLine / sizeof(T);
  for (int64_t i = 0; i < height; ++i) {
    T* const row = reinterpret_cast<T*>(band + i * task.band_row());
    if (!task.windows) {
      copy_row(task, place, group, i, task.band_channels * task.conv.per_word(), row);
    } else if (!task.overlap) {
      copy_row(task, place, group, i, task.conv.shape.group_channels(), line);
      cut_windows(task, place.width, line, row);
    } else {
      const int64_t channels = task.conv.shape.group_channels();
      const int64_t count = task.band_size(1, place.width) * channels;
      copy_row(task, place, group, i, channels, row);
      if (!all_finite(reinterpret_cast<const bf16*>(row), count)) return false;
      clear(row + count, 1);
    }
  }
  return true;
}

// Distance in A from one output pixel to the next, and to the next output row.
DEVICE_INLINE int64_t pixel_stride(const DirectTask& task) {
  const int64_t stride = task.conv.shape.stride[1];
  if (task.windows) return task.band_channels;
  return task.copies ? stride / task.step(1) * task.band_channels
                     : stride * task.input_strides[3] / task.conv.per_word();
}

inline int64_t cut_runs(const DirectTask& task, const Place& place, int64_t group, PixelRun* runs) {
  const ConvShape& shape = task.conv.shape;
  const int64_t* stride = task.input_strides;
  const int64_t row_stride = task.copies ? shape.stride[0] / task.step(0) * task.band_row()
                                         : shape.stride[0] * stride[2] / task.conv.per_word();
  const int64_t start = task.copies ? 0
                                    : (place.image * stride[0] + group * shape.group_channels()) /
                                              task.conv.per_word() +
                                          place.y * row_stride + place.x * pixel_stride(task);
  // Cut evenly, so that any two make the halves of a tile.
  const int64_t parts = (place.width + kHalf - 1) / kHalf;
  int64_t count = 0;
  for (int64_t i = 0; i < place.height; ++i) {
    const int64_t pixel = place.image * task.output_stride(0) +
                          (place.y + i) * task.output_stride(1) + place.x * task.output_stride(2);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t j = place.width * part / parts;
      runs[count++] = {start + i * row_stride + j * pixel_stride(task),
                       pixel + j * task.output_stride(2), place.width * (part + 1) / parts - j};
    }
  }
  return count;
}

struct DirectTile {
  const float* a;
  PixelRun first, second;  // the second as long as the first, or one shorter
  int64_t pixel_stride;
  const int64_t* segments;
  int64_t segment_count, depth, longest_chain;
  const float* b;
  ReadAhead ahead;
  Expected next;  // of the next tile
  int64_t out_channels;
  int64_t out_stride;  // from pixel to pixel, in pixels
};

// memory += sums, and the sums start again.
template <int kRows>
DEVICE_INLINE void put_aside(Vector (&sums)[kRows][2], float (*memory)[kPanel], int column) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      float* const to = memory[r] + column + v * kLanes;
      store(to, load(to) + sums[r][v]);
      sums[r][v] = Vector{};
    }
  }
}

template <class T, class Element, int kRows>
void multiply_tile(const DirectTile& tile, const Finish<T>& finish) {
  const bool direct = in_registers(finish);
  const bool in_parts = tile.segment_count * tile.depth > tile.longest_chain;
  float memory[kRows][kPanel];
  if (in_parts) clear(memory[0], kRows * kPanel);
  const auto offset = [&](int r) {
    constexpr int kFirst = first_half(kRows);
    const int64_t pixel = r < kFirst ? tile.first.pixel + r * tile.out_stride
                                     : tile.second.pixel + (r - kFirst) * tile.out_stride;
    return pixel * tile.out_channels;
  };
  for (int column = 0; column < kPanel; column += kTileColumnsInRegisters) {
    Vector sums[kRows][2] = {};
    const float* b = tile.b + column;
    int64_t chain = 0;
    ReadAhead ahead = tile.ahead;
    ExpectedLines<kPanel * sizeof(T)> lines{tile.next};
    for (int64_t s = 0; s < tile.segment_count; ++s) {
      for (int64_t k = 0; k < tile.depth; k += tile.longest_chain) {
        const int64_t length =
            tile.depth - k < tile.longest_chain ? tile.depth - k : tile.longest_chain;
        const float* a = tile.a + tile.segments[s] + k;
        if (chain + length > tile.longest_chain) {
          put_aside(sums, memory, column);
          chain = 0;
        }
        gemm_add<Element, kRows>(
            sums, {a + tile.first.input, a + tile.second.input, tile.pixel_stride, 16}, b, length,
            ahead, lines);
        chain += length;
        b += length * kPanel;
      }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) {
        if (in_parts) sums[r][v] += load(memory[r] + column + v * kLanes);
        if (direct) {
          finish_vector(finish, offset(r), column + v * kLanes, sums[r][v]);
        } else {
          store(memory[r] + column + v * kLanes, sums[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < kRows && !direct; ++r) finish_row(finish, offset(r), memory[r]);
}

template <class T, class Element, int... kRows>
struct DirectTable {
  static constexpr decltype(&multiply_tile<T, Element, 1>) kByRows[] = {
      multiply_tile<T, Element, kRows>...};
};
#if RESNET_FUSED_VECTOR_BYTES == 64
template <class T, class Element>
using Directs = DirectTable<T, Element, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
template <class T, class Element>
using Directs = DirectTable<T, Element, 1, 2, 3, 4, 5, 6>;
#endif

// The halves of the next tile: two of the `left` runs, or both halves of the last one. Returns
// their pixels.
inline int64_t take_runs(const PixelRun* runs, int64_t left, DirectTile& tile) {
  if (left > 1) {
    const bool longer = runs[1].length > runs[0].length;
    tile.first = runs[longer ? 1 : 0], tile.second = runs[longer ? 0 : 1];
  } else {
    const int64_t half = first_half(runs[0].length);
    tile.first = {runs[0].input, runs[0].pixel, half};
    tile.second = {runs[0].input + half * tile.pixel_stride, runs[0].pixel + half * tile.out_stride,
                   runs[0].length - half};
  }
  return tile.first.length + tile.second.length;
}

// Where the input is read in place, tiles of the first panel bring in the pixels of the next tile,
// one line for each step of the sum; otherwise the first two tiles bring in the next panel.
DEVICE_INLINE ReadAhead read_ahead(const DirectTask& task, const DirectTile& tile, int64_t done,
                                   bool first_panel) {
  if (first_panel && !task.copies) {
    return {tile.a + tile.first.input + kGemmRows * tile.pixel_stride, 16};
  }
  if (done < 2) return {tile.b + task.panel_size() + done * 16, kPanel};
  return {tile.b, 0};
}

template <class T>
DEVICE_INLINE Expected expect(const Finish<T>& finish, int64_t offset, int64_t pixel_stride) {
  const T* const residual = finish.residual == nullptr ? finish.output : finish.residual;
  return {reinterpret_cast<const char*>(finish.output + offset),
          reinterpret_cast<const char*>(residual + offset),
          pixel_stride * static_cast<int64_t>(sizeof(T)), kGemmRows};
}

template <class T, class Element>
void direct_kernel(const DirectTask& task, const Place& place, int64_t group, int64_t begin,
                   int64_t end, float* band, PixelRun* runs) {
  const ConvShape& shape = task.conv.shape;
  if (task.copies && !copy_band<T>(task, place, group, band)) {
    return direct_kernel<T, Element>(*task.apart, place, group, begin, end, band, runs);
  }
  const int64_t count = cut_runs(task, place, group, runs);
  const int64_t outputs = shape.group_out_channels();
  const int64_t segments = static_cast<int64_t>(task.segments.size());
  DirectTile tile{task.copies ? band : static_cast<const float*>(task.conv.input),
                  {},
                  {},
                  pixel_stride(task),
                  task.segments.data(),
                  segments,
                  task.depth,
                  task.longest_chain,
                  nullptr,
                  {},
                  {},
                  shape.out_channels,
                  task.output_stride(2)};
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t channel = group * outputs + panel * kPanel;
    const int64_t left = outputs - panel * kPanel;
    const T* const residual = static_cast<const T*>(task.conv.residual);
    const Finish<T> finish{task.conv.shift + channel,
                           residual == nullptr ? nullptr : residual + channel,
                           static_cast<T*>(task.conv.output) + channel,
                           left < kPanel ? left : kPanel,
                           task.conv.act,
                           task.conv.negative_slope};
    tile.b = task.conv.packed + (group * task.panels() + panel) * task.panel_size();
    for (int64_t i = 0, done = 0; i < count; ++done) {
      const int64_t rows = take_runs(runs + i, count - i, tile);
      i += count - i < 2 ? 1 : 2;
      tile.ahead = read_ahead(task, tile, done, panel == begin);
      // Then come the next tile, the next panel or the next unit.
      const bool last = panel + 1 == end;
      const int64_t pixel = i < count ? runs[i].pixel
                            : last
                                ? runs[count - 1].pixel + runs[count - 1].length * tile.out_stride
                                : runs[0].pixel;
      const int64_t turn = i < count ? 0 : last ? begin - panel : 1;
      tile.next = expect(finish, pixel * shape.out_channels + turn * kPanel,
                         shape.out_channels * tile.out_stride);
      Directs<T, Element>::kByRows[rows - 1](tile, finish);
    }
  }
}

// Null where this instruction set cannot multiply pairs.
inline DirectKernel direct_kernel_for(const DirectTask& task) {
  if (!task.conv.pairs) return direct_kernel<float, Floats>;
#if RESNET_FUSED_BF16_INSTRUCTIONS
  return direct_kernel<bf16, Bf16Pairs>;
#else
  return nullptr;
#endif
}
