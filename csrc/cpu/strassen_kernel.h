// Some pixels: their blocks' sums, then seven products for each pair of panels.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "gemm_kernel.h"

// Two tiles of as many rows; the last row of the second may be there for show.
struct TilePair {
  int64_t first;  // pixel of the first tile
  int64_t rows;
  int64_t second_rows;
  float* blocks;  // [product][rows][task.row()]
};

DEVICE_INLINE const float* input_pixel(const StrassenTask& task, int64_t pixel) {
  const ConvShape& s = task.conv.shape;
  const float* input = static_cast<const float*>(task.conv.input);
  if (s.stride[0] == 1 && s.stride[1] == 1) return input + pixel * s.channels;
  const int64_t x = pixel % s.out_width, row = pixel / s.out_width;
  const int64_t y = row % s.out_height, image = row / s.out_height;
  return input + ((image * s.height + y * s.stride[0]) * s.width + x * s.stride[1]) * s.channels;
}

// The left factors, in the order in which the products are made.
inline void make_blocks(const StrassenTask& task, const TilePair& pair) {
  const int64_t half = task.half(), size = pair.rows * task.row();
  for (int64_t r = 0; r < pair.rows; ++r) {
    const float* top = input_pixel(task, pair.first + r);
    const int64_t below = r < pair.second_rows ? pair.rows + r : r;
    const float* bottom = input_pixel(task, pair.first + below);
    float* const to = pair.blocks + r * task.row();
    for (int64_t c = 0; c < half; c += kLanes) {
      const Vector a11 = load(top + c), a12 = load(top + half + c);
      const Vector a21 = load(bottom + c), a22 = load(bottom + half + c);
      const Vector s1 = a21 + a22, s2 = s1 - a11;
      const Vector factors[kProducts] = {a11, a12, s2, a11 - a21, a22, s1, a12 - s2};
      for (int64_t i = 0; i < kProducts; ++i) store(to + i * size + c, factors[i]);
    }
  }
}

// One of the four blocks of the output.
struct Quadrant {
  Finish<float> finish;
  int64_t pixel, rows;
  float (*memory)[kPanel];  // sums that wait for an activation
};

template <int kRows>
DEVICE_INLINE void finish_quadrant(const Quadrant& to, int64_t out_channels, int column,
                                   const Vector (&sums)[kRows][2], Vector& check) {
  const bool direct = in_registers(to.finish);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < 2; ++v) {
      check += sums[r][v] * 0.0f;
      const int at = column + v * kLanes;
      if (!direct) {
        store(to.memory[r] + at, sums[r][v]);
      } else if (r < to.rows) {
        finish_vector(to.finish, (to.pixel + r) * out_channels, at, sums[r][v]);
      }
    }
  }
}

template <int kRows>
DEVICE_INLINE void copy(const Vector (&from)[kRows][2], Vector (&to)[kRows][2]) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) to[r][0] = from[r][0], to[r][1] = from[r][1];
}
template <int kRows>
DEVICE_INLINE void add(const Vector (&from)[kRows][2], Vector (&to)[kRows][2]) {
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) to[r][0] += from[r][0], to[r][1] += from[r][1];
}

// What a pair of tiles and a pair of panels multiply.
struct Factors {
  const float* blocks;
  const float* weights;
  int64_t half, row;
  const float* next;  // input that is needed later, or null
  bool from_memory;   // the weights come from there, not from L3
};

// The lines of ExpectedLines, and the second line of each row of the next product's weights: from
// memory the processor does not bring it in time by itself.
struct StrassenLines : ExpectedLines<kPanel * sizeof(float)> {
  const float* weights;
  int64_t weight_step;

  DEVICE_INLINE void prefetch() {
    ExpectedLines::prefetch();
    __builtin_prefetch(weights, 0, 2);
    weights += weight_step;
  }
};

// What comes in during a product: the lines of a quadrant, or a part of the next input.
template <int kRows>
DEVICE_INLINE ExpectedLines<kPanel * sizeof(float)> lines_of(const Quadrant& to,
                                                             int64_t out_channels) {
  const float* const output = to.finish.output + to.pixel * out_channels;
  const float* const residual =
      to.finish.residual == nullptr ? output : to.finish.residual + to.pixel * out_channels;
  return {{reinterpret_cast<const char*>(output), reinterpret_cast<const char*>(residual),
           out_channels * static_cast<int64_t>(sizeof(float)), kRows}};
}
DEVICE_INLINE ExpectedLines<kPanel * sizeof(float)> lines_of(const Factors& f, int64_t part) {
  const bool any = f.next != nullptr;
  const float* const input = any ? f.next + part * f.half * kPanel : f.weights;
  return {{reinterpret_cast<const char*>(f.weights), reinterpret_cast<const char*>(input),
           any ? kPanel * static_cast<int64_t>(sizeof(float)) : 0, f.half}};
}

// sums += product i, which is added up by itself: one chain of all products would round more often
// at the size of what cancels. Meanwhile the next product's weights come in, and other lines.
template <int kRows>
DEVICE_INLINE void add_product(int64_t i, const Factors& f, int column,
                               ExpectedLines<kPanel * sizeof(float)> lines,
                               Vector (&sums)[kRows][2]) {
  const float* a = f.blocks + i * kRows * f.row;
  const float* b = f.weights + i * f.half * kPanel;
  const float* const after = b + f.half * kPanel;
  ReadAhead ahead{after, kPanel};
  StrassenLines all{lines, f.from_memory ? after + 16 : b, f.from_memory ? kPanel : 0};
  Vector product[kRows][2] = {};
  gemm_add<Floats, kRows>(product, {a, a + first_half(kRows) * f.row, f.row, 16}, b + column,
                          f.half, ahead, all);
  add(product, sums);
}

// Whether all is finite: an infinity anywhere would spoil both tiles and both halves.
template <int kRows>
bool multiply_pair(const Factors& f, const Quadrant (&c)[2][2], int64_t out_channels) {
  Vector check{};
  for (int column = 0; column < kPanel; column += kTileColumnsInRegisters) {
    Vector sums[kRows][2] = {}, first[kRows][2], u2[kRows][2], u3[kRows][2];
    add_product(0, f, column, lines_of(f, 0), sums);
    copy(sums, first);
    add_product(1, f, column, lines_of<kRows>(c[0][0], out_channels), sums);
    finish_quadrant(c[0][0], out_channels, column, sums, check);
    copy(first, sums);
    add_product(2, f, column, lines_of(f, 1), sums);
    copy(sums, u2);
    add_product(3, f, column, lines_of(f, 2), sums);
    copy(sums, u3);
    add_product(4, f, column, lines_of<kRows>(c[1][0], out_channels), sums);
    finish_quadrant(c[1][0], out_channels, column, sums, check);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Vector{};
    add_product(5, f, column, lines_of<kRows>(c[1][1], out_channels), sums);
    add(sums, u3);
    finish_quadrant(c[1][1], out_channels, column, u3, check);
    add(u2, sums);
    add_product(6, f, column, lines_of<kRows>(c[0][1], out_channels), sums);
    finish_quadrant(c[0][1], out_channels, column, sums, check);
  }
  float lanes[kLanes];
  store(lanes, check);
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite &= lanes[i] == 0.0f;
  for (int q = 0; q < 4; ++q) {
    const Quadrant& to = c[q / 2][q % 2];
    for (int64_t r = 0; r < to.rows && !in_registers(to.finish); ++r) {
      finish_row(to.finish, (to.pixel + r) * out_channels, to.memory[r]);
    }
  }
  return finite;
}

// A quadrant again by the definition.
inline void convolve_quadrant(const StrassenTask& task, const Quadrant& to, int64_t channel) {
  const float* const weight = static_cast<const float*>(task.weight);
  for (int64_t r = 0; r < to.rows; ++r) {
    const float* pixel = input_pixel(task, to.pixel + r);
    float sums[kPanel];
    for (int64_t n = 0; n < kPanel; ++n) {
      const float* w = weight + (channel + n) * task.weight_strides[0];
      float sum = 0;
      for (int64_t c = 0; c < task.conv.shape.channels; ++c) {
        sum += pixel[c] * w[c * task.weight_strides[1]];
      }
      sums[n] = sum * task.scale[channel + n];
    }
    finish_row(to.finish, (to.pixel + r) * task.conv.shape.out_channels, sums);
  }
}

template <int... kRows>
struct StrassenTable {
  static constexpr decltype(&multiply_pair<1>) kByRows[] = {multiply_pair<kRows>...};
};
#if RESNET_FUSED_VECTOR_BYTES == 64
using StrassenPairs = StrassenTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using StrassenPairs = StrassenTable<1, 2, 3, 4, 5, 6>;
#endif

// Pixels of a pair of tiles, at most.
inline int64_t strassen_pair_pixels() {
  return 2 * kGemmRows;
}

inline void strassen(const StrassenTask& task, int64_t first, int64_t last, int64_t begin,
                     int64_t end, float* workspace) {
  const int64_t out_channels = task.conv.shape.out_channels;
  const int64_t image = task.image_pixels(), parts = task.image_pairs(strassen_pair_pixels());
  const auto pair_at = [&](int64_t i) {
    const int64_t part = i % parts, from = image * part / parts;
    const int64_t size = image * (part + 1) / parts - from;
    const int64_t rows = (size + 1) / 2;
    return TilePair{i / parts * image + from, rows, size - rows,
                    workspace + (i - first) * kProducts * kGemmRows * task.row()};
  };
  for (int64_t i = first; i < last; ++i) make_blocks(task, pair_at(i));
  const bool dense = task.conv.shape.stride[0] == 1 && task.conv.shape.stride[1] == 1;
  const bool from_memory = task.columns() * kProducts * task.half() > kFarWeights;
  float memory[4][kGemmRows][kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t i = first; i < last; ++i) {
      const TilePair pair = pair_at(i);
      Quadrant c[2][2];
      for (int q = 0; q < 4; ++q) {
        const int64_t channel = panel * kPanel + q % 2 * task.columns();
        const float* const residual = static_cast<const float*>(task.conv.residual);
        c[q / 2][q % 2] = {
            {task.conv.shift + channel, residual == nullptr ? nullptr : residual + channel,
             static_cast<float*>(task.conv.output) + channel, kPanel, task.conv.act,
             task.conv.negative_slope},
            pair.first + q / 2 * pair.rows,
            q / 2 == 0 ? pair.rows : pair.second_rows,
            memory[q]};
      }
      // The next unit's pixels; with a stride it would be half of them in vain.
      const float* const after =
          dense ? input_pixel(task, pair_at(i + last - first).first) : nullptr;
      const Factors factors{pair.blocks,
                            task.conv.packed + panel * kProducts * task.half() * kPanel,
                            task.half(),
                            task.row(),
                            panel == begin ? after : nullptr,
                            from_memory};
      if (!StrassenPairs::kByRows[pair.rows - 1](factors, c, out_channels)) {
        for (int q = 0; q < 4; ++q) {
          const int64_t channel = panel * kPanel + q % 2 * task.columns();
          convolve_quadrant(task, c[q / 2][q % 2], channel);
        }
      }
    }
  }
}

inline StrassenKernel strassen_kernel_for(const StrassenTask&) {
  return &strassen;
}
