// Winograd's transforms the other way round, for the gradient of the weights (weight_grad.cpp):
//
//     y = A^T [sum_c U (.) V] A   gives   dU = M (.) V, M = A dy A^T,   and   dw = G^T dU G
//
// Included inside the namespace of one instruction set (for_each_isa.h), after
// winograd_transform.h, whose transforms these transpose.

// M for n points: what OutputTransform multiplies each of them by, times the outputs' gradients.
template <int kPoints, int kOutputs>
struct OutputGradTransform;

template <>
struct OutputGradTransform<6, 4> {
  DEVICE_INLINE static void apply(const Vector (&y)[4], Vector (&m)[6]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even_a = y[0] + y[2] * (a * a), odd_a = y[1] * a + y[3] * (a * a * a);
    const Vector even_b = y[0] + y[2] * (b * b), odd_b = y[1] * b + y[3] * (b * b * b);
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
};

template <>
struct OutputGradTransform<5, 3> {
  DEVICE_INLINE static void apply(const Vector (&y)[3], Vector (&m)[5]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even = y[0] + y[2] * (a * a), odd = y[1] * a;
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = y[0] + y[1] * b + y[2] * (b * b);
    m[4] = y[2];
  }
};

template <>
struct OutputGradTransform<4, 2> {
  DEVICE_INLINE static void apply(const Vector (&y)[2], Vector (&m)[4]) {
    constexpr float a = 0.75f;
    m[0] = y[0];
    m[1] = y[0] + y[1] * a;
    m[2] = y[0] - y[1] * a;
    m[3] = y[1];
  }
};

template <>
struct OutputGradTransform<5, 4> {
  DEVICE_INLINE static void apply(const Vector (&y)[4], Vector (&m)[5]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even = y[0] + y[2] * (a * a), odd = y[1] * a + y[3] * (a * a * a);
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = y[0] + y[1] * b + y[2] * (b * b) + y[3] * (b * b * b);
    m[4] = y[3];
  }
};

template <>
struct OutputGradTransform<4, 3> {
  DEVICE_INLINE static void apply(const Vector (&y)[3], Vector (&m)[4]) {
    constexpr float a = 0.75f;
    const Vector even = y[0] + y[2] * (a * a), odd = y[1] * a;
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = y[2];
  }
};

template <>
struct OutputGradTransform<3, 2> {
  DEVICE_INLINE static void apply(const Vector (&y)[2], Vector (&m)[3]) {
    m[0] = y[0];
    m[1] = y[0] + y[1] * 0.75f;
    m[2] = y[1];
  }
};

// A line of a tile's output gradients and what it becomes.
template <int kOutputs, int kStride>
struct OutputGradLine;

template <int kOutputs>
struct OutputGradLine<kOutputs, 1> {
  static constexpr int kIn = kOutputs, kOut = kOutputs + 2;
  DEVICE_INLINE static void apply(const Vector (&y)[kIn], Vector (&m)[kOut]) {
    OutputGradTransform<kOut, kOutputs>::apply(y, m);
  }
};

template <int kOutputs>
struct OutputGradLine<kOutputs, 2> {
  static constexpr int kIn = kOutputs, kOut = 2 * kOutputs + 1;
  DEVICE_INLINE static void apply(const Vector (&y)[kIn], Vector (&m)[kOut]) {
    constexpr int kEven = kOutputs + 1;
    Vector even[kEven];
    OutputGradTransform<kEven, kOutputs>::apply(y, even);
#pragma GCC unroll 5
    for (int i = 0; i < kEven; ++i) m[i] = even[i];
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) m[kEven + i] = y[i];
  }
};

// The taps' gradients from those of what they become (transform_taps in winograd_weights.h).
template <int kStride>
DEVICE_INLINE void gather_tap_grads(const Vector (&u)[6], Vector (&g)[3]) {
  constexpr float a = kWinogradPoints[1], b = kWinogradPoints[3];
  const Vector even_a = u[1] + u[2], odd_a = u[1] - u[2];
  if (kStride == 2) {
    g[0] = u[0] + even_a + u[3];
    g[1] = u[5];
    g[2] = odd_a * a + u[3] * b + u[4];
  } else {
    const Vector even_b = u[3] + u[4], odd_b = u[3] - u[4];
    g[0] = u[0] + even_a + even_b;
    g[1] = odd_a * a + odd_b * b;
    g[2] = even_a * (a * a) + even_b * (b * b) + u[5];
  }
}
