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

// The part [first, last) of a window that lies inside an image side, in steps of the dilation.
struct Window {
  int64_t first, last;
  Window(const PoolShape& s, int side, int64_t out, int64_t size) {
    first = out * s.stride[side] - s.padding[side];
    last = first + (s.kernel[side] - 1) * s.dilation[side] + 1;
    while (first < 0) first += s.dilation[side];
    if (last > size) last = size;
  }
};

// One pixel of the output, channels [0, n): n is kBlock or what is left. NaN wins, as in eager.
template <class T>
DEVICE_INLINE void pool_pixel(const T* image, T* output, const PoolShape& s, Window rows,
                              Window columns, int64_t n) {
  constexpr int64_t kBlock = 64;
  compute_t<T> best[kBlock];
  for (int64_t c = 0; c < kBlock; ++c) best[c] = -INFINITY;
  for (int64_t h = rows.first; h < rows.last; h += s.dilation[0]) {
    for (int64_t w = columns.first; w < columns.last; w += s.dilation[1]) {
      const T* x = image + (h * s.width + w) * s.channels;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const compute_t<T> value = pool_load(x[c]);
        best[c] = (value > best[c]) | (value != value) ? value : best[c];
      }
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) pool_store(best[c], output + c);
}

template <class T>
void max_pool_rows(const void* input, void* output, const PoolShape& s, int64_t begin,
                   int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / s.out_height;
    const T* image = static_cast<const T*>(input) + n * s.height * s.width * s.channels;
    const Window rows(s, 0, row % s.out_height, s.height);
    for (int64_t column = 0; column < s.out_width; ++column) {
      const Window columns(s, 1, column, s.width);
      T* pixel = static_cast<T*>(output) + (row * s.out_width + column) * s.channels;
      int64_t c = 0;
      for (; c + 64 <= s.channels; c += 64) {
        pool_pixel(image + c, pixel + c, s, rows, columns, int64_t(64));
      }
      if (c < s.channels) pool_pixel(image + c, pixel + c, s, rows, columns, s.channels - c);
    }
  }
}

inline MaxPoolKernel max_pool_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &max_pool_rows<float>;
    case ScalarType::Double: return &max_pool_rows<double>;
    default: return &max_pool_rows<bf16>;
  }
}
