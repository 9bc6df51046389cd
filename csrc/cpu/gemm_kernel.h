// C = A B for a few rows and 32 columns, the sums in registers: 14 rows x 32 columns fill 28 of
// AVX-512's 32 registers and reach its multiply-add peak (Goto, van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008).
//
// A and B consist of 32-bit words: a float, or two bfloat16 numbers of consecutive channels, whose
// products are added to one float (AVX512_BF16's vdpbf16ps, twice the multiply-adds a cycle).
//
// A is read in place, as two halves of equally spaced rows, so that a tile may span two image rows
// and still needs few address registers. B is packed as [depth][32].
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "vectors.h"
#include "finish.h"

struct Floats {
  static constexpr int kPerWord = 1;
  DEVICE_INLINE static void multiply_add(Vector& sum, Vector a, Vector b) { sum += a * b; }
  DEVICE_INLINE static void store_words(float* to, Vector value) { store(to, value); }
};

#if RESNET_FUSED_BF16_INSTRUCTIONS
struct Bf16Pairs {
  static constexpr int kPerWord = 2;
  DEVICE_INLINE static void multiply_add(Vector& sum, Vector a, Vector b) {
    sum = bits_as<Vector>(
        _mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(a), bits_as<__m512bh>(b)));
  }
  DEVICE_INLINE static void store_words(float* to, Vector value) {
    store(reinterpret_cast<bf16*>(to), value);
  }
};
#endif

constexpr int kHalf = kLanes == 16 ? 7 : 3;
constexpr int kGemmRows = 2 * kHalf;
constexpr int kTileColumnsInRegisters = 2 * kLanes;

// Rows of the first of A's halves; the second has as many, or one fewer.
constexpr int64_t first_half(int64_t rows) {
  return (rows + 1) / 2;
}

// Weights that are needed next, read ahead into L2: one cache line per row of B, as more at once
// would fill the queue of misses and stop everything.
struct ReadAhead {
  const float* next;
  int64_t step;                     // floats; 0 reads nothing more
  int64_t left = int64_t(1) << 40;  // lines, a multiple of 16

  // The second pass over B reads the lines behind the first one's.
  ReadAhead in_pass(int64_t pass) const { return {next + pass * 16, pass < 2 ? step : 0, left}; }
};

// Lines of memory that will be written, and those of a residual: one pixel's each step. Asked for
// all at once they would fill the queue of misses and stop everything.
struct Expected {
  const char* output;
  const char* residual;
  int64_t step;  // bytes
  int64_t left;  // pixels
};

template <int kBytes>
struct ExpectedLines : Expected {
  DEVICE_INLINE void prefetch() {
#pragma GCC unroll 2
    for (int i = 0; i < kBytes; i += 64) {
      __builtin_prefetch(output + i, 1);
      __builtin_prefetch(residual + i);
    }
    output += step, residual += step;
  }
  DEVICE_INLINE void done(int64_t steps) {
    left -= steps;
    if (left <= 0) step = 0;
  }
};

struct NothingExpected {
  DEVICE_INLINE void prefetch() {}
  DEVICE_INLINE void done(int64_t) {}
};

struct GemmRows {
  const float* first;   // row 0
  const float* second;  // row first_half(rows)
  int64_t row_stride;
  int64_t chunk_stride;  // from 16 columns of A to the next 16
};

template <class Element, int kRows, class Lines>
DEVICE_INLINE void gemm_add(Vector (&sums)[kRows][2], const GemmRows& a, const float* b,
                            int64_t depth, ReadAhead& ahead, Lines& lines) {
  constexpr int kFirst = first_half(kRows);
  const float* first = a.first;
  const float* second = a.second;
  for (int64_t chunk = 0; chunk < depth; chunk += 16) {
    const int64_t length = depth - chunk < 16 ? depth - chunk : 16;
#pragma GCC unroll 1
    for (int64_t k = 0; k < length; ++k) {
      const Vector b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r) {
        const float* row =
            r < kFirst ? first + r * a.row_stride : second + (r - kFirst) * a.row_stride;
        const Vector value = all(row[k]);
        Element::multiply_add(sums[r][0], value, b0);
        Element::multiply_add(sums[r][1], value, b1);
      }
      b += kPanel;
      __builtin_prefetch(ahead.next, 0, 2);
      ahead.next += ahead.step;
      lines.prefetch();
    }
    lines.done(length);
    if ((ahead.left -= length) <= 0) ahead.step = 0;
    first += a.chunk_stride;
    second += a.chunk_stride;
  }
}

// c[row][32] = A B, or c += A B: the product is a sum of its own, since the error grows with the
// length of a chain.
template <class Element, int kRows>
void gemm_to_memory(const GemmRows& a, const float* b, int64_t depth, ReadAhead ahead, bool adds,
                    float* c) {
  for (int column = 0; column < kPanel; column += kTileColumnsInRegisters) {
    Vector sums[kRows][2] = {};
    NothingExpected none;
    gemm_add<Element, kRows>(sums, a, b + column, depth, ahead, none);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      float* const to = c + r * kPanel + column;
      store(to, adds ? load(to) + sums[r][0] : sums[r][0]);
      store(to + kLanes, adds ? load(to + kLanes) + sums[r][1] : sums[r][1]);
    }
  }
}
