// Rows of a max-pool's output, or of its input's gradient: each number is read, compared and added
// up in registers, the channels of a pixel together. Included inside the namespace of one
// instruction set (for_each_isa.h), after simd.h.

#include "vectors.h"

// ---- channels that are looked at together ------------------------------------------------------

template <class Number, int kCount>
struct VectorOf {
  typedef Number type __attribute__((vector_size(kCount * sizeof(Number))));
};

// Some registers' channels, whatever the numbers are computed in.
template <class T, int kCount>
struct Registers {
  using Number = compute_t<T>;
  static constexpr int kSize = kCount;
  static constexpr int kEach = RESNET_FUSED_VECTOR_BYTES / sizeof(Number);
  using Value = typename VectorOf<Number, kEach>::type;
  using Word = std::conditional_t<sizeof(Number) == 8, int64_t, int32_t>;
  using Place = typename VectorOf<Word, kEach>::type;
  using Bytes = typename VectorOf<uint8_t, kEach>::type;
  using Halves = typename VectorOf<uint16_t, kEach>::type;
  using Words = typename VectorOf<uint32_t, kEach>::type;

  DEVICE_INLINE static Value read(const float* from) { return load(from); }
  DEVICE_INLINE static Value read(const bf16* from) { return load(from); }
  DEVICE_INLINE static Value read(const double* from) {
    Value value;
    std::memcpy(&value, from, sizeof(Value));
    return value;
  }
  DEVICE_INLINE static void write(float* to, Value value) { store(to, value); }
  DEVICE_INLINE static void write(bf16* to, Value value) { store(to, value); }
  DEVICE_INLINE static void write(double* to, Value value) {
    std::memcpy(to, &value, sizeof(Value));
  }
  // A number that was read, so that nothing is rounded.
  DEVICE_INLINE static void write_back(T* to, Value value) {
    if constexpr (std::is_same<T, bf16>::value) {
      const auto halves = __builtin_convertvector(bits_as<WordVector>(value) >> 16, HalfVector);
      std::memcpy(to, &halves, sizeof(halves));
    } else {
      write(to, value);
    }
  }
  // Twice as wide and half as wide are instructions; GCC 12 takes larger steps number by number.
  DEVICE_INLINE static Place read_places(const uint8_t* from) {
    Bytes bytes;
    std::memcpy(&bytes, from, kEach);
    const Halves halves = __builtin_convertvector(bytes, Halves);
    const Words words = __builtin_convertvector(halves, Words);
    return __builtin_convertvector(words, Place);
  }
  DEVICE_INLINE static void write_places(uint8_t* to, Place places) {
    const Words words = __builtin_convertvector(places, Words);
    const Halves halves = __builtin_convertvector(words, Halves);
    const Bytes bytes = __builtin_convertvector(halves, Bytes);
    std::memcpy(to, &bytes, kEach);
  }
};

// One channel.
template <class T>
struct Single {
  static constexpr int kSize = 1, kEach = 1;
  using Value = compute_t<T>;
  using Place = int32_t;
  DEVICE_INLINE static Value read(const T* from) { return widened(*from); }
  DEVICE_INLINE static void write(T* to, Value value) { narrow(value, *to); }
  DEVICE_INLINE static void write_back(T* to, Value value) { narrow(value, *to); }
  DEVICE_INLINE static Place read_places(const uint8_t* from) { return *from; }
  DEVICE_INLINE static void write_places(uint8_t* to, Place place) {
    *to = static_cast<uint8_t>(place);
  }
};

// Calls body(group, first channel) for all channels.
template <class T, class Body>
DEVICE_INLINE void for_groups(int64_t channels, const Body& body) {
  constexpr int64_t kEach = Registers<T, 1>::kEach;
  int64_t c = 0;
  for (; c + 4 * kEach <= channels; c += 4 * kEach) body(Registers<T, 4>(), c);
  for (; c + kEach <= channels; c += kEach) body(Registers<T, 1>(), c);
  for (; c < channels; ++c) body(Single<T>(), c);
}

// ---- from windows to pixels --------------------------------------------------------------------

// The part [first, last) of a window that lies inside an image side, in steps of the dilation.
struct Window {
  int64_t first, last;
  int64_t index = 0;  // of the first one in the window
  Window(const PoolShape& s, int side, int64_t out, int64_t size) {
    first = out * s.stride[side] - s.padding[side];
    last = first + (s.kernel[side] - 1) * s.dilation[side] + 1;
    for (; first < 0; ++index) first += s.dilation[side];
    if (last > size) last = size;
  }
};

// Calls body(pixel's first number, place in the window) for the part of a window inside the image.
template <class T, class Body>
DEVICE_INLINE void for_pixels(const T* image, const PoolShape& s, const Window& rows,
                              const Window& columns, const Body& body) {
  int64_t position = rows.index * s.kernel[1] + columns.index;
  for (int64_t h = rows.first; h < rows.last; h += s.dilation[0], position += s.kernel[1]) {
    int32_t at = static_cast<int32_t>(position);
    for (int64_t w = columns.first; w < columns.last; w += s.dilation[1], ++at) {
      body(image + (h * s.width + w) * s.channels, at);
    }
  }
}

// Calls body(group, image, rows, columns, first number of the output) for the rows [begin, end) of
// the output; the image begins with the group's channel.
template <class T, class Body>
DEVICE_INLINE void for_windows(const T* input, const PoolShape& s, int64_t begin, int64_t end,
                               const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const T* image = input + row / s.out_height * s.height * s.width * s.channels;
    const Window rows(s, 0, row % s.out_height, s.height);
    for (int64_t column = 0; column < s.out_width; ++column) {
      const Window columns(s, 1, column, s.width);
      const int64_t pixel = (row * s.out_width + column) * s.channels;
      for_groups<T>(s.channels, [&](auto group, int64_t c) __attribute__((always_inline)) {
        body(group, image + c, rows, columns, pixel + c);
      });
    }
  }
}

// NaN wins, as in eager.
template <class T, bool kPositions>
void max_pool_rows(const void* input, void* output, uint8_t* positions, const PoolShape& s,
                   int64_t begin, int64_t end) {
  const auto pool = [&](auto group, const T* image, const Window& rows, const Window& columns,
                        int64_t first) __attribute__((always_inline)) {
    using Group = decltype(group);
    using Value = typename Group::Value;
    using Place = typename Group::Place;
    Value best[Group::kSize];
    Place found[Group::kSize];
    const int32_t start = static_cast<int32_t>(rows.index * s.kernel[1] + columns.index);
    for (int i = 0; i < Group::kSize; ++i) best[i] = Value{} - INFINITY, found[i] = Place{} + start;
    const auto compare = [&](const T* x, int32_t position) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < Group::kSize; ++i) {
        const Value value = Group::read(x + i * Group::kEach);
        const auto wins = (value > best[i]) | (value != value);
        best[i] = wins ? value : best[i];
        if (kPositions) found[i] = wins ? Place{} + position : found[i];
      }
    };
    for_pixels(image, s, rows, columns, compare);
#pragma GCC unroll 4
    for (int i = 0; i < Group::kSize; ++i) {
      Group::write_back(static_cast<T*>(output) + first + i * Group::kEach, best[i]);
      if (kPositions) Group::write_places(positions + first + i * Group::kEach, found[i]);
    }
  };
  for_windows(static_cast<const T*>(input), s, begin, end, pool);
}

// Where a window found its largest value, another tensor's value.
template <class T>
void read_found_rows(const void* input, const uint8_t* positions, void* output, const PoolShape& s,
                     int64_t begin, int64_t end) {
  const auto read = [&](auto group, const T* image, const Window& rows, const Window& columns,
                        int64_t first) __attribute__((always_inline)) {
    using Group = decltype(group);
    typename Group::Value value[Group::kSize] = {};
    typename Group::Place places[Group::kSize];
#pragma GCC unroll 4
    for (int i = 0; i < Group::kSize; ++i) {
      places[i] = Group::read_places(positions + first + i * Group::kEach);
    }
    const auto look = [&](const T* x, int32_t position) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int i = 0; i < Group::kSize; ++i) {
        value[i] = places[i] == position ? Group::read(x + i * Group::kEach) : value[i];
      }
    };
    for_pixels(image, s, rows, columns, look);
#pragma GCC unroll 4
    for (int i = 0; i < Group::kSize; ++i) {
      Group::write_back(static_cast<T*>(output) + first + i * Group::kEach, value[i]);
    }
  };
  for_windows(static_cast<const T*>(input), s, begin, end, read);
}

// ---- from pixels to windows --------------------------------------------------------------------

// The windows along one side that a pixel is in. Pixel stride * q + p is the k-th of window q +
// shift[k], where p is phase[k]; nothing is divided but once a side.
class Readers {
 public:
  Readers(const PoolShape& s, int side)
      : kernel_(s.kernel[side]),
        stride_(s.stride[side]),
        windows_(side == 0 ? s.out_height : s.out_width) {
    for (int64_t k = 0; k < kernel_; ++k) {
      const int64_t behind = k * s.dilation[side] - s.padding[side];  // of the window's own place
      const int64_t turns = behind >= 0 ? behind / stride_ : -((stride_ - 1 - behind) / stride_);
      phase_[k] = behind - turns * stride_;
      shift_[k] = -turns;
    }
  }

  void find(int64_t pixel) { start(pixel / stride_, pixel % stride_); }
  void next() { p_ + 1 < stride_ ? start(q_, p_ + 1) : start(q_ + 1, 0); }

  int64_t count() const { return count_; }
  int64_t window(int64_t i) const { return window_[i]; }
  int64_t place(int64_t i) const { return place_[i]; }  // of the pixel in it

 private:
  void start(int64_t q, int64_t p) {
    q_ = q, p_ = p, count_ = 0;
    for (int64_t k = 0; k < kernel_; ++k) {
      const int64_t window = q + shift_[k];
      if (phase_[k] != p || window < 0 || window >= windows_) continue;
      window_[count_] = window, place_[count_++] = k;
    }
  }

  int64_t kernel_, stride_, windows_;
  int64_t q_, p_, count_;
  int64_t phase_[kMostPositions], shift_[kMostPositions];
  int64_t window_[kMostPositions], place_[kMostPositions];
};

template <class T>
void max_unpool_rows(const void* grad, const uint8_t* positions, void* grad_input,
                     const PoolShape& s, int64_t begin, int64_t end) {
  Readers rows(s, 0), columns(s, 1);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first_row = row / s.height * s.out_height;
    rows.find(row % s.height);
    columns.find(0);
    for (int64_t x = 0; x < s.width; ++x, columns.next()) {
      T* const to = static_cast<T*>(grad_input) + (row * s.width + x) * s.channels;
      for_groups<T>(s.channels, [&](auto group, int64_t c) __attribute__((always_inline)) {
        using Group = decltype(group);
        using Value = typename Group::Value;
        Value sums[Group::kSize] = {};
        for (int64_t i = 0; i < rows.count(); ++i) {
          for (int64_t j = 0; j < columns.count(); ++j) {
            const int64_t window =
                ((first_row + rows.window(i)) * s.out_width + columns.window(j)) * s.channels + c;
            const int32_t wanted =
                static_cast<int32_t>(rows.place(i) * s.kernel[1] + columns.place(j));
#pragma GCC unroll 4
            for (int n = 0; n < Group::kSize; ++n) {
              const int64_t at = window + n * Group::kEach;
              const auto found = Group::read_places(positions + at) == wanted;
              sums[n] += found ? Group::read(static_cast<const T*>(grad) + at) : Value{};
            }
          }
        }
#pragma GCC unroll 4
        for (int n = 0; n < Group::kSize; ++n) Group::write(to + c + n * Group::kEach, sums[n]);
      });
    }
  }
}

template <bool kPositions>
MaxPoolKernel max_pool_kernel_for(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &max_pool_rows<float, kPositions>;
    case ScalarType::Double: return &max_pool_rows<double, kPositions>;
    default: return &max_pool_rows<bf16, kPositions>;
  }
}
inline MaxPoolKernel max_pool_kernel(ScalarType dtype, bool positions) {
  return positions ? max_pool_kernel_for<true>(dtype) : max_pool_kernel_for<false>(dtype);
}
inline ReadFoundKernel read_found_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &read_found_rows<float>;
    case ScalarType::Double: return &read_found_rows<double>;
    default: return &read_found_rows<bf16>;
  }
}
inline MaxUnpoolKernel max_unpool_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &max_unpool_rows<float>;
    case ScalarType::Double: return &max_unpool_rows<double>;
    default: return &max_unpool_rows<bf16>;
  }
}
