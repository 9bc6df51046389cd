// What every kernel starts from: 16-bit conversions, exp and erf, channel parameters, tiles.
// Included inside the namespace of one instruction set (for_each_isa.h). Plain loops throughout,
// written so that the compiler vectorises them.

#define DEVICE_INLINE inline __attribute__((always_inline))

template <class To, class From>
DEVICE_INLINE To bits_as(From value) {
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// ---- 16-bit types -------------------------------------------------------------------------------

DEVICE_INLINE float widened(bf16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
DEVICE_INLINE float widened(float x) {
  return x;
}
DEVICE_INLINE double widened(double x) {
  return x;
}

// Round to nearest even; a NaN becomes 0x7FC0, as in PyTorch.
DEVICE_INLINE void narrow(float x, bf16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}
DEVICE_INLINE void narrow(float x, float& to) {
  to = x;
}
DEVICE_INLINE void narrow(double x, double& to) {
  to = x;
}

inline void widen(const bf16* __restrict from, float* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = widened(from[i]);
}
inline void narrow(const float* __restrict from, bf16* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(from[i], to[i]);
}

#if RESNET_FUSED_F16C

inline void widen(const f16* __restrict from, float* __restrict to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = _cvtsh_ss(from[i].bits);
}

inline void narrow(const float* __restrict from, f16* __restrict to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
}

#else

// Exponents are moved by a multiplication, which handles denormals too (Maratyszcza, FP16).
inline void widen(const f16* __restrict from, float* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = from[i].bits;
    const uint32_t scaled = bits_as<uint32_t>(bits_as<float>((half & 0x7FFFu) << 13) * 0x1p112f);
    const uint32_t special = (half & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;  // Inf or NaN
    to[i] = bits_as<float>(scaled | special | ((half & 0x8000u) << 16));
  }
}

inline void narrow(const float* __restrict from, f16* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = bits_as<uint32_t>(from[i]);
    const uint32_t twice = word + word;
    const uint32_t exponent =
        (twice & 0xFF000000u) < 0x71000000u ? 0x71000000u : (twice & 0xFF000000u);
    const float magnitude = bits_as<float>(word & 0x7FFFFFFFu) * 0x1p112f * 0x1p-110f;
    const uint32_t bits =
        bits_as<uint32_t>(bits_as<float>((exponent >> 1) + 0x07800000u) + magnitude);
    const uint32_t finite = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
    to[i].bits =
        static_cast<uint16_t>(((word >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : finite));
  }
}

#endif

// ---- exp and erf --------------------------------------------------------------------------------

// exp(n ln 2 + r) = 2^n (1 + r + r^2 / 2 + ...), |r| <= ln 2 / 2; error 1 ulp. 2^n is applied in
// two halves so that results overflow to Inf and underflow through the denormals as they should.
DEVICE_INLINE float exp_(float x) {
  const float low = x < -105.0f ? -105.0f : x;  // a NaN passes both
  const float bounded = low > 89.0f ? 89.0f : low;
  const float magic = 0x1.8p23f;  // adding it rounds to an integer, left in the low mantissa bits
  const float shifted = bounded * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (bounded - n * 0x1.62E400p-1f) - n * 0x1.7F7D1Cp-20f;  // ln 2 in two parts
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const int32_t whole = bits_as<int32_t>(shifted) - bits_as<int32_t>(magic);
  const int32_t half = whole >> 1;
  const float scale1 = bits_as<float>(static_cast<uint32_t>(half + 127) << 23);
  const float scale2 = bits_as<float>(static_cast<uint32_t>(whole - half + 127) << 23);
  return (p + 1.0f) * scale1 * scale2;
}
DEVICE_INLINE double exp_(double x) {
  return std::exp(x);
}

// Two minimax polynomials, about 1 ulp; coefficients by N. Juffa (stackoverflow.com/a/35148199).
DEVICE_INLINE float erf_(float x) {
  const float t = x < 0.0f ? -x : x;
  const float s = x * x;
  float tail =
      (0x1.222900p-16f * t - 0x1.91d2ccp-12f) * s + (0x1.fd1336p-09f * t - 0x1.8d6300p-06f);
  tail = tail * t + 0x1.b55cb0p-4f;
  tail = tail * t + 0x1.450aa0p-1f;
  tail = tail * t + 0x1.079d0cp-3f;
  tail = tail * t + t;
  const float large = 1.0f - exp_(-tail);
  float small = -0x1.3a1a82p-11f;
  small = small * s + 0x1.473f48p-08f;
  small = small * s - 0x1.b68bd2p-06f;
  small = small * s + 0x1.ce1a46p-04f;
  small = small * s - 0x1.8126e0p-02f;
  small = small * s + 0x1.06eba6p-03f;
  small = small * x + x;
  const float signed_large = x < 0.0f ? -large : large;
  return t > 0.921875f ? signed_large : small;
}
DEVICE_INLINE double erf_(double x) {
  return std::erf(x);
}

#include "../common/activation.h"

// The argument of act. One expression for forward and backward, so that both see the same sign.
template <class A>
DEVICE_INLINE A normalized(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// ---- channel parameters -------------------------------------------------------------------------

// A tile either runs along the channels, with one parameter per column, or lies within one channel.
template <class A>
struct PerColumn {
  const A* values;
  DEVICE_INLINE A operator[](int64_t column) const { return values[column]; }
};
template <class A>
struct Uniform {
  A value;
  DEVICE_INLINE A operator[](int64_t) const { return value; }
};
struct AlongChannels {
  template <class A>
  DEVICE_INLINE PerColumn<A> operator()(const A* values, int64_t channel) const {
    return {values + channel};
  }
};
struct WithinChannel {
  template <class A>
  DEVICE_INLINE Uniform<A> operator()(const A* values, int64_t channel) const {
    return {values[channel]};
  }
};

// ---- tiles --------------------------------------------------------------------------------------

struct Tile {
  int64_t offset;  // of its first element
  int64_t rows;
  int64_t columns;
  int64_t stride;   // from row to row in memory; only tiles of float16 data are not dense
  int64_t channel;  // of its first column
  bool along;       // one channel per column, else all of one channel
};

// What a tile's numbers are read as. float16 is converted tile by tile through dense buffers that
// stay in L1: 1024 floats, eight rows (as many as are added at once, channel_sums.h) of 128 or more
// of fewer columns.
template <class T>
using tile_t = std::conditional_t<std::is_same<T, f16>::value, float, T>;
constexpr int64_t kTile = 1024;
constexpr int64_t kTileColumns = 128;

template <class T>
struct Input {
  DEVICE_INLINE const T* read(const T* data, const Tile& tile) { return data + tile.offset; }
};
template <>
struct Input<f16> {
  float buffer[kTile];
  DEVICE_INLINE const float* read(const f16* data, const Tile& tile) {
    const bool dense = tile.columns == tile.stride;
    const int64_t run = dense ? tile.rows * tile.columns : tile.columns;
    for (int64_t row = 0; row < (dense ? 1 : tile.rows); ++row) {
      widen(data + tile.offset + row * tile.stride, buffer + row * run, run);
    }
    return buffer;
  }
};

template <class T>
struct Output {
  DEVICE_INLINE T* begin(T* data, const Tile& tile) { return data + tile.offset; }
  DEVICE_INLINE void end(T*, const Tile&) {}
};
template <>
struct Output<f16> {
  float buffer[kTile];
  DEVICE_INLINE float* begin(f16*, const Tile&) { return buffer; }
  DEVICE_INLINE void end(f16* data, const Tile& tile) {
    const bool dense = tile.columns == tile.stride;
    const int64_t run = dense ? tile.rows * tile.columns : tile.columns;
    for (int64_t row = 0; row < (dense ? 1 : tile.rows); ++row) {
      narrow(buffer + row * run, data + tile.offset + row * tile.stride, run);
    }
  }
};

// What a kernel does to a tile is called through a pointer, which costs nothing beside a tile.
template <class Body>
DEVICE_INLINE void by_direction(bool along, const Body& body) {
  if (along) {
    body(AlongChannels{});
  } else {
    body(WithinChannel{});
  }
}

// Rows [begin, end) of an [outer][channels] array.
template <class T, class Body>
DEVICE_INLINE void for_tiles_along(int64_t channels, int64_t begin, int64_t end, const Body& body) {
  constexpr bool is_converted = !std::is_same<T, tile_t<T>>::value;
  const int64_t columns = is_converted && channels > kTileColumns ? kTileColumns : channels;
  const int64_t step = is_converted ? kTile / columns : end - begin;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t rows = step < end - row ? step : end - row;
    for (int64_t c = 0; c < channels; c += columns) {
      const int64_t width = columns < channels - c ? columns : channels - c;
      body(Tile{row * channels + c, rows, width, channels, c, true});
    }
  }
}

// Elements [begin, end), all of one channel.
template <class Body>
DEVICE_INLINE void for_tiles_within(int64_t channel, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t length = kTile < end - i ? kTile : end - i;
    body(Tile{i, 1, length, length, channel, false});
  }
}

// Units [begin, end): rows of an [outer][channels] array, or planes of an [outer][channels][inner].
template <class T, class Body>
DEVICE_INLINE void for_tiles(const Extent& extent, int64_t begin, int64_t end, const Body& body) {
  if (extent.inner == 1) {
    for_tiles_along<T>(extent.channels, begin, end, body);
    return;
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    for_tiles_within(plane % extent.channels, plane * extent.inner, (plane + 1) * extent.inner,
                     body);
  }
}
