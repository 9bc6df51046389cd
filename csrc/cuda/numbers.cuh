// Numbers of a tensor on their way: one, or the 16 bytes that a thread moves at once, widened to
// what is computed with.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "hardware.cuh"

namespace resnet_fused::cuda {

// float64 for float64, else float32.
template <class T>
using compute_t = std::conditional_t<std::is_same<T, double>::value, double, float>;

// Numbers in 16 bytes. float64 is there for correctness, one number at a time.
template <class T>
constexpr int kVector = std::is_same<T, double>::value ? 1 : 16 / static_cast<int>(sizeof(T));

// What holds n numbers as they lie in memory.
template <class T, int n>
using Raw = std::conditional_t<n == 1, T, Bytes16>;

DEVICE_INLINE double to_float(double x) {
  return x;
}

template <class T>
DEVICE_INLINE T narrowed(compute_t<T> x) {
  if constexpr (std::is_same<T, double>::value) {
    return x;
  } else {
    return rounded<T>(x);
  }
}

// From memory that this kernel may also write to.
template <class T, int n>
DEVICE_INLINE Raw<T, n> load(const T* from) {
  static_assert(n == 1 || n == kVector<T>);
  return *reinterpret_cast<const Raw<T, n>*>(from);
}

// From memory that nobody writes to, and that is not read again soon.
template <class T, int n>
DEVICE_INLINE Raw<T, n> load_stream(const T* from) {
  if constexpr (n == 1) {
    return *from;
  } else {
    return load_once(from);
  }
}

template <class T, int n>
DEVICE_INLINE void widen(const Raw<T, n>& raw, compute_t<T> (&to)[n]) {
  T numbers[n];
  std::memcpy(numbers, &raw, sizeof(numbers));
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = to_float(numbers[i]);
}

// As they lie in 16 bytes.
template <class T, int n>
DEVICE_INLINE Bytes16 narrow(const compute_t<T> (&values)[n]) {
  static_assert(n > 1 && n == kVector<T>);
  Bytes16 bytes;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      bytes.words[i] = pair(values[2 * i], values[2 * i + 1], narrowed<T>(0));
  } else {
    std::memcpy(bytes.words, values, sizeof(bytes));
  }
  return bytes;
}

// Eight numbers as they lie in memory.
template <class T>
struct Eight {
  Bytes16 part[sizeof(T) / 2];
};

template <class T>
DEVICE_INLINE Eight<T> load_eight(const T* from) {
  Eight<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
    raw.part[i] = load_once(from + i * kVector<T>);
  return raw;
}

template <class T>
DEVICE_INLINE void widen_eight(const Eight<T>& raw, float (&to)[8]) {
  constexpr int n = kVector<T>;
#pragma unroll
  for (int i = 0; i < 8; i += n) {
    float part[n];
    widen<T, n>(raw.part[i / n], part);
#pragma unroll
    for (int j = 0; j < n; ++j) to[i + j] = part[j];
  }
}

template <class T>
DEVICE_INLINE Eight<T> narrow_eight(const float (&values)[8]) {
  constexpr int n = kVector<T>;
  Eight<T> raw;
#pragma unroll
  for (int i = 0; i < 8; i += n) {
    float part[n];
#pragma unroll
    for (int j = 0; j < n; ++j) part[j] = values[i + j];
    raw.part[i / n] = narrow<T, n>(part);
  }
  return raw;
}

template <class T, int n>
DEVICE_INLINE void store(T* to, const compute_t<T> (&values)[n]) {
  if constexpr (n == 1) {
    *to = narrowed<T>(values[0]);
  } else {
    store_16(to, narrow<T, n>(values));
  }
}

// n numbers of shared memory; several are aligned to 16 bytes.
template <class A, int n>
DEVICE_INLINE void read_shared(const A* from, A (&to)[n]) {
  if constexpr (n * sizeof(A) % 16 == 0) {
    constexpr int each = 16 / sizeof(A);
#pragma unroll
    for (int i = 0; i < n; i += each) {
      const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(from + i);
      std::memcpy(to + i, &bytes, sizeof(bytes));
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

}  // namespace resnet_fused::cuda
