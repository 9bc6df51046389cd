// Some pixels of an output row, 16 channels at a time.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "vectors.h"
#include "finish.h"

// Number i of each group of `c` lanes, in all lanes of the group; c divides the vector's lanes.
struct GroupLanes {
#if RESNET_FUSED_VECTOR_BYTES == 64
  __m512i from;
  void set(int64_t c, int64_t i) {
    int32_t lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l / c * c + i);
    from = _mm512_loadu_si512(lanes);
  }
  DEVICE_INLINE Vector of(Vector x) const {
    // GCC 12 warns of the unmasked one, whose header reads an undefined register.
    return bits_as<Vector>(_mm512_maskz_permutexvar_ps(0xFFFF, from, bits_as<__m512>(x)));
  }
#elif RESNET_FUSED_VECTOR_BYTES == 32
  __m256i from;
  void set(int64_t c, int64_t i) {
    int32_t lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<int32_t>(l / c * c + i);
    from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  }
  DEVICE_INLINE Vector of(Vector x) const {
    return bits_as<Vector>(_mm256_permutevar8x32_ps(bits_as<__m256>(x), from));
  }
#else
  int64_t c, i;
  void set(int64_t width, int64_t number) { c = width, i = number; }
  DEVICE_INLINE Vector of(Vector x) const {
    Vector y;
    for (int64_t l = 0; l < kLanes; ++l) y[l] = x[l / c * c + i];
    return y;
  }
#endif
};

// Up to kMost output pixels of a row; the inputs of each row of the kernel are contiguous pointers.
template <class T, int kStride, int kMost>
struct GroupedRow {
  static constexpr int kInputs = (kMost - 1) * kStride + 3;
  const T* inputs[3][kInputs];  // pixels, or zeros outside of the image
  bool inside[3];               // the row
};

// sums += x w for input j of a row and the three columns of the kernel that meet it.
template <int kStride, int kMost>
DEVICE_INLINE void add_input(int j, Vector x, const Vector (&w)[3], Vector (&sums)[kMost]) {
#pragma GCC unroll 3
  for (int s = 0; s < 3; ++s) {
    const int p = (j - s) / kStride;
    if (j >= s && (j - s) % kStride == 0 && p < kMost) sums[p] += x * w[s];
  }
}

// kMost pixels x one vector of channels, from `channel` on.
template <class T, int kStride, int kMost>
DEVICE_INLINE void multiply_group(const GroupedRow<T, kStride, kMost>& row, const float* weights,
                                  const GroupLanes* lanes, int64_t c, int64_t channel,
                                  Vector (&sums)[kMost]) {
  constexpr int kInputs = GroupedRow<T, kStride, kMost>::kInputs;
  const int64_t lane = channel % kGroupedLanes;  // of the packed weights' 16
  for (int r = 0; r < 3; ++r) {
    if (!row.inside[r]) continue;
    Vector inputs[kInputs];
#pragma GCC unroll 17
    for (int j = 0; j < kInputs; ++j) inputs[j] = load(row.inputs[r][j] + channel);
    for (int64_t i = 0; i < c; ++i) {
      Vector w[3];
#pragma GCC unroll 3
      for (int s = 0; s < 3; ++s) {
        w[s] = load(weights + ((r * c + i) * 3 + s) * kGroupedLanes + lane);
      }
      if (c <= kLanes) {
#pragma GCC unroll 17
        for (int j = 0; j < kInputs; ++j) {
          add_input<kStride>(j, lanes[i].of(inputs[j]), w, sums);
        }
      } else {
        const int64_t from = channel / c * c + i;
#pragma GCC unroll 17
        for (int j = 0; j < kInputs; ++j) {
          add_input<kStride>(j, all(as_float(row.inputs[r][j][from])), w, sums);
        }
      }
    }
  }
}

template <class T, int kStride>
void grouped_rows(const ConvArguments& conv, int64_t begin, int64_t end, const void* zeros) {
  constexpr int kMost = kStride == 1 ? 8 : 6;
  using Row = GroupedRow<T, kStride, kMost>;
  const ConvShape& shape = conv.shape;
  const int64_t c = shape.group_channels(), channels = shape.channels;
  Finish<T> finish{conv.shift,
                   static_cast<const T*>(conv.residual),
                   static_cast<T*>(conv.output),
                   kPanel,
                   conv.act,
                   conv.negative_slope};
  const bool direct = in_registers(finish);
  finish.columns = kLanes;
  GroupLanes lanes[kGroupedLanes];
  for (int64_t i = 0; i < c && c <= kLanes; ++i) lanes[i].set(c, i);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / shape.out_height, out_y = index % shape.out_height;
    for (int64_t out_x = 0; out_x < shape.out_width; out_x += kMost) {
      Row row;
      for (int r = 0; r < 3; ++r) {
        const int64_t y = out_y * kStride - shape.padding[0] + r;
        row.inside[r] = y >= 0 && y < shape.height;
        const T* line =
            static_cast<const T*>(conv.input) + (image * shape.height + y) * shape.width * channels;
        for (int j = 0; j < Row::kInputs; ++j) {
          const int64_t x = out_x * kStride - shape.padding[1] + j;
          const bool inside = row.inside[r] && x >= 0 && x < shape.width;
          row.inputs[r][j] = inside ? line + x * channels : static_cast<const T*>(zeros);
        }
      }
      const int64_t left = shape.out_width - out_x;
      const int count = static_cast<int>(left < kMost ? left : kMost);
      const int64_t pixel = index * shape.out_width + out_x;
      for (int64_t channel = 0; channel < channels; channel += kLanes) {
        Vector sums[kMost] = {};
        for (int p = kMost; p < 2 * kMost; ++p) {  // the next pixels' lines
          __builtin_prefetch(finish.output + (pixel + p) * channels + channel, 1);
        }
        // Of the inputs, the rows that no earlier output row has read.
        for (int r = 3 - kStride; r < 3; ++r) {
          for (int j = 0; j < kMost * kStride; ++j) {
            __builtin_prefetch(row.inputs[r][j] + kMost * kStride * channels + channel);
          }
        }
        const float* weights = conv.packed + channel / kGroupedLanes * kGroupedLanes * 9 * c;
        multiply_group<T, kStride, kMost>(row, weights, lanes, c, channel, sums);
        finish.shift = conv.shift + channel;
        for (int p = 0; p < count; ++p) {
          const int64_t offset = (pixel + p) * channels + channel;
          if (direct) {
            finish_vector(finish, offset, 0, sums[p]);
          } else {
            float memory[kLanes];
            store(memory, sums[p]);
            finish_row(finish, offset, memory);
          }
        }
      }
    }
  }
}

inline GroupedKernel grouped_kernel_for(const ConvArguments& conv) {
  const bool strided = conv.shape.stride[0] == 2;
  if (conv.is_bf16) return strided ? grouped_rows<bf16, 2> : grouped_rows<bf16, 1>;
  return strided ? grouped_rows<float, 2> : grouped_rows<float, 1>;
}
