// Included inside the namespace of one instruction set, after simd.h.

template <class Bits>
uint64_t max_bits(const void* data, int64_t begin, int64_t end) {
  const Bits* values = static_cast<const Bits*>(data);
  const Bits magnitude = static_cast<Bits>(~Bits(0)) >> 1;
  constexpr int64_t kStreams = 4 * 64 / sizeof(Bits);  // four cache lines: hides the latency of max
  Bits best[kStreams] = {};
  int64_t i = begin;
  for (; i + kStreams <= end; i += kStreams) {
#pragma omp simd
    for (int64_t j = 0; j < kStreams; ++j) {
      const Bits value = values[i + j] & magnitude;
      best[j] = value > best[j] ? value : best[j];
    }
  }
  for (; i < end; ++i) {
    const Bits value = values[i] & magnitude;
    best[0] = value > best[0] ? value : best[0];
  }
  Bits result = 0;
  for (int64_t j = 0; j < kStreams; ++j) result = best[j] > result ? best[j] : result;
  return result;
}

inline MaxBitsKernel max_bits_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &max_bits<uint32_t>;
    case ScalarType::Double: return &max_bits<uint64_t>;
    default: return &max_bits<uint16_t>;
  }
}
