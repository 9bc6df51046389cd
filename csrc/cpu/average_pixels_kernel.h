// Included inside the namespace of one instruction set, after simd.h.

DEVICE_INLINE void widen(const float* __restrict from, float* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
DEVICE_INLINE void narrow(const float* __restrict from, float* __restrict to, int64_t n) {
  widen(from, to, n);
}

// total += part
template <class Total>
DEVICE_INLINE void add(const float* __restrict part, Total* __restrict total, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) total[c] += part[c];
}

// Runs of pixels are added up to rows and rows, in double, to the total: an error grows with the
// run's length and not with the number of pixels.
template <class T>
void average_pixels(const void* input, void* output, int64_t channels, int64_t height,
                    int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 16;
  const int64_t units = (channels + kAverageChannels - 1) / kAverageChannels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / units, first = unit % units * kAverageChannels;
    const int64_t n = channels - first < kAverageChannels ? channels - first : kAverageChannels;
    const T* x = static_cast<const T*>(input) + image * height * width * channels + first;
    double total[kAverageChannels] = {};
    for (int64_t i = 0; i < height; ++i) {
      float row[kAverageChannels] = {};
      for (int64_t j = 0; j < width; j += kRun) {
        float run[kAverageChannels] = {}, pixel[kAverageChannels];
        for (int64_t k = j; k < width && k < j + kRun; ++k, x += channels) {
          widen(x, pixel, n);
          add(pixel, run, n);
        }
        add(run, row, n);
      }
      add(row, total, n);
    }
    float mean[kAverageChannels];
    const double pixels = static_cast<double>(height * width);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) mean[c] = static_cast<float>(total[c] / pixels);
    narrow(mean, static_cast<T*>(output) + image * channels + first, n);
  }
}

inline AveragePixelsKernel average_pixels_kernel(ScalarType dtype) {
  return dtype == ScalarType::Float ? &average_pixels<float> : &average_pixels<bf16>;
}
