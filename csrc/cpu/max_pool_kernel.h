// Included inside the namespace of one instruction set, after simd.h.

DEVICE_INLINE float pool_load(float x) {
  return x;
}
DEVICE_INLINE double pool_load(double x) {
  return x;
}
DEVICE_INLINE float pool_load(bf16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
DEVICE_INLINE void pool_store(float x, float* to) {
  *to = x;
}
DEVICE_INLINE void pool_store(double x, double* to) {
  *to = x;
}
DEVICE_INLINE void pool_store(float x, bf16* to) {
  to->bits = static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16);  // exact: it was loaded from one
}

// Sums of several gradients are rounded.
DEVICE_INLINE void pool_round(float x, float* to) {
  *to = x;
}
DEVICE_INLINE void pool_round(double x, double* to) {
  *to = x;
}
DEVICE_INLINE void pool_round(float x, bf16* to) {
  narrow(&x, to, 1);
}

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

// Channels that are looked at together.
constexpr int64_t kPoolBlock = 64;

// Calls body(image, rows, columns, first number of the output, how many) for the rows [begin, end)
// of the output.
template <class T, class Body>
DEVICE_INLINE void for_windows(const T* input, const PoolShape& s, int64_t begin, int64_t end,
                               const Body& body) {
  for (int64_t row = begin; row < end; ++row) {
    const T* image = input + row / s.out_height * s.height * s.width * s.channels;
    const Window rows(s, 0, row % s.out_height, s.height);
    for (int64_t column = 0; column < s.out_width; ++column) {
      const Window columns(s, 1, column, s.width);
      const int64_t pixel = (row * s.out_width + column) * s.channels;
      int64_t c = 0;
      for (; c + kPoolBlock <= s.channels; c += kPoolBlock) {
        body(image + c, rows, columns, pixel + c, kPoolBlock);
      }
      if (c < s.channels) body(image + c, rows, columns, pixel + c, s.channels - c);
    }
  }
}

// NaN wins, as in eager.
template <class T, bool kPositions>
void max_pool_rows(const void* input, void* output, uint8_t* positions, const PoolShape& s,
                   int64_t begin, int64_t end) {
  const auto pool = [&](const T* image, const Window& rows, const Window& columns, int64_t first,
                        int64_t n) __attribute__((always_inline)) {
    compute_t<T> best[kPoolBlock];
    int32_t found[kPoolBlock];
    const int32_t start = static_cast<int32_t>(rows.index * s.kernel[1] + columns.index);
    for (int64_t c = 0; c < kPoolBlock; ++c) best[c] = -INFINITY, found[c] = start;
    const auto compare = [&](const T* x, int32_t position) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const compute_t<T> value = pool_load(x[c]);
        const bool wins = (value > best[c]) | (value != value);
        best[c] = wins ? value : best[c];
        if (kPositions) found[c] = wins ? position : found[c];
      }
    };
    for_pixels(image, s, rows, columns, compare);
    T* const to = static_cast<T*>(output) + first;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) pool_store(best[c], to + c);
    if (!kPositions) return;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) positions[first + c] = static_cast<uint8_t>(found[c]);
  };
  for_windows(static_cast<const T*>(input), s, begin, end, pool);
}

// Where a window found its largest value, another tensor's value.
template <class T>
void read_found_rows(const void* input, const uint8_t* positions, void* output, const PoolShape& s,
                     int64_t begin, int64_t end) {
  const auto read = [&](const T* image, const Window& rows, const Window& columns, int64_t first,
                        int64_t n) __attribute__((always_inline)) {
    compute_t<T> value[kPoolBlock] = {};
    const auto look = [&](const T* x, int32_t position) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        value[c] = positions[first + c] == position ? pool_load(x[c]) : value[c];
      }
    };
    for_pixels(image, s, rows, columns, look);
    T* const to = static_cast<T*>(output) + first;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) pool_store(value[c], to + c);
  };
  for_windows(static_cast<const T*>(input), s, begin, end, read);
}

// sums += grad where a window of one output row found position `wanted`
template <class T>
DEVICE_INLINE void add_found(const T* grad, const uint8_t* positions, int32_t wanted, int64_t n,
                             compute_t<T>* sums) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    sums[c] += positions[c] == wanted ? pool_load(grad[c]) : compute_t<T>(0);
  }
}

template <class T>
void max_unpool_rows(const void* grad, const uint8_t* positions, void* grad_input,
                     const PoolShape& s, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / s.height, y = row % s.height;
    for (int64_t x = 0; x < s.width; ++x) {
      T* const to = static_cast<T*>(grad_input) + (row * s.width + x) * s.channels;
      for (int64_t first = 0; first < s.channels; first += kBlock) {
        const int64_t count = s.channels - first < kBlock ? s.channels - first : kBlock;
        compute_t<T> sums[kBlock] = {};
        // The windows whose r-th row and k-th column this pixel is.
        for (int64_t r = 0; r < s.kernel[0]; ++r) {
          const int64_t top = y + s.padding[0] - r * s.dilation[0];
          if (top < 0 || top % s.stride[0] != 0 || top / s.stride[0] >= s.out_height) continue;
          for (int64_t k = 0; k < s.kernel[1]; ++k) {
            const int64_t left = x + s.padding[1] - k * s.dilation[1];
            if (left < 0 || left % s.stride[1] != 0 || left / s.stride[1] >= s.out_width) continue;
            const int64_t window =
                ((n * s.out_height + top / s.stride[0]) * s.out_width + left / s.stride[1]) *
                    s.channels +
                first;
            add_found(static_cast<const T*>(grad) + window, positions + window,
                      static_cast<int32_t>(r * s.kernel[1] + k), count, sums);
          }
        }
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) pool_round(sums[c], to + first + c);
      }
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
