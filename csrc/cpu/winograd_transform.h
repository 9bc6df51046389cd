// One-dimensional Winograd transforms (Toom-Cook) for a kernel of three taps.
//
//     y[i] = sum_k d[i + k] g[k] = sum_p p^i U_p V_p,  U_p = g[0] + g[1] p + g[2] p^2,
//
// over the points 0, a, -a, b, -b and infinity, where U = g[2] and only the last y reads it. With
// a = 3/4, b = 3/2 the error is half of that of the textbook's 1 and 2 (Alam et al., "Winograd
// Convolution for Deep Neural Networks: Efficient Point Selection", 2022). The normalisation that
// usually goes into U is in V, so that tiles with fewer outputs use a subset of the same U:
//
//     outputs  inputs  points
//        4       6     0  a -a  b -b  inf
//        3       5     0  a -a  b     inf
//        2       4     0  a -a        inf
//
// Row p of V's matrix has the coefficients of prod_{q != p} (x - q) / (p - q); row inf those of
// prod_q (x - q). It depends on the points alone, so kernels of two taps share it.
//
// With stride 2, y[i] = (d[2i] g[0] + d[2i + 2] g[2]) + d[2i + 1] g[1]: even inputs meet a kernel
// of two taps, in m + 1 points, and odd ones a single tap, m products. That makes 2m + 1 instead of
// 3m. Included inside the namespace of one instruction set (for_each_isa.h).

// V for n points: n inputs, n numbers.
template <int kPoints>
struct PointTransform;

template <>
struct PointTransform<6> {
  DEVICE_INLINE static void apply(const Vector (&d)[6], Vector (&v)[6]) {
    constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;
    constexpr float na = 1 / (2 * aa * (aa - bb)), nb = 1 / (2 * bb * (bb - aa));
    v[0] = d[0] - d[2] * ((aa + bb) / (aa * bb)) + d[4] * (1 / (aa * bb));
    const Vector even_a = d[4] * na - d[2] * (bb * na),
                 odd_a = d[3] * (a * na) - d[1] * (a * bb * na);
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    const Vector even_b = d[4] * nb - d[2] * (aa * nb),
                 odd_b = d[3] * (b * nb) - d[1] * (b * aa * nb);
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] - d[3] * (aa + bb) + d[1] * (aa * bb);
  }
};

template <>
struct PointTransform<5> {
  DEVICE_INLINE static void apply(const Vector (&d)[5], Vector (&v)[5]) {
    constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;
    constexpr float np = 1 / (2 * aa * (a - b)), nn = -1 / (2 * aa * (a + b));
    constexpr float nb = 1 / (b * (bb - aa));
    v[0] = d[0] - d[1] * (1 / b) - d[2] * (1 / aa) + d[3] * (1 / (aa * b));
    v[1] = d[3] * np + d[2] * ((a - b) * np) - d[1] * (a * b * np);
    v[2] = d[3] * nn - d[2] * ((a + b) * nn) + d[1] * (a * b * nn);
    v[3] = d[3] * nb - d[1] * (aa * nb);
    v[4] = d[4] - d[3] * b - d[2] * aa + d[1] * (aa * b);
  }
};

template <>
struct PointTransform<4> {
  DEVICE_INLINE static void apply(const Vector (&d)[4], Vector (&v)[4]) {
    constexpr float a = 0.75f, n = 1 / (2 * a * a);
    v[0] = d[0] - d[2] * (1 / (a * a));
    const Vector even = d[2] * n, odd = d[1] * (a * n);
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = d[3] - d[1] * (a * a);
  }
};

template <>
struct PointTransform<3> {
  DEVICE_INLINE static void apply(const Vector (&d)[3], Vector (&v)[3]) {
    constexpr float a = 0.75f;
    v[0] = d[0] - d[1] * (1 / a);
    v[1] = d[1] * (1 / a);
    v[2] = d[2] - d[1] * a;
  }
};

// y of n points: m outputs.
template <int kPoints, int kOutputs>
struct OutputTransform;

template <>
struct OutputTransform<6, 4> {
  DEVICE_INLINE static void apply(const Vector (&m)[6], Vector (&y)[4]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a * a + odd_b * b;
    y[2] = even_a * (a * a) + even_b * (b * b);
    y[3] = odd_a * (a * a * a) + odd_b * (b * b * b) + m[5];
  }
};

template <>
struct OutputTransform<5, 3> {
  DEVICE_INLINE static void apply(const Vector (&m)[5], Vector (&y)[3]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even = m[1] + m[2], odd = m[1] - m[2];
    y[0] = m[0] + even + m[3];
    y[1] = odd * a + m[3] * b;
    y[2] = even * (a * a) + m[3] * (b * b) + m[4];
  }
};

template <>
struct OutputTransform<4, 2> {
  DEVICE_INLINE static void apply(const Vector (&m)[4], Vector (&y)[2]) {
    constexpr float a = 0.75f;
    y[0] = m[0] + m[1] + m[2];
    y[1] = (m[1] - m[2]) * a + m[3];
  }
};

template <>
struct OutputTransform<5, 4> {
  DEVICE_INLINE static void apply(const Vector (&m)[5], Vector (&y)[4]) {
    constexpr float a = 0.75f, b = 1.5f;
    const Vector even = m[1] + m[2], odd = m[1] - m[2];
    y[0] = m[0] + even + m[3];
    y[1] = odd * a + m[3] * b;
    y[2] = even * (a * a) + m[3] * (b * b);
    y[3] = odd * (a * a * a) + m[3] * (b * b * b) + m[4];
  }
};

template <>
struct OutputTransform<4, 3> {
  DEVICE_INLINE static void apply(const Vector (&m)[4], Vector (&y)[3]) {
    constexpr float a = 0.75f;
    const Vector even = m[1] + m[2];
    y[0] = m[0] + even;
    y[1] = (m[1] - m[2]) * a;
    y[2] = even * (a * a) + m[3];
  }
};

template <>
struct OutputTransform<3, 2> {
  DEVICE_INLINE static void apply(const Vector (&m)[3], Vector (&y)[2]) {
    y[0] = m[0] + m[1];
    y[1] = m[1] * 0.75f + m[2];
  }
};

// One line of a tile: its inputs become as many numbers, each of which meets one weight.
template <int kOutputs, int kStride>
struct Line;

template <int kOutputs>
struct Line<kOutputs, 1> {
  static constexpr int kSize = kOutputs + 2;
  DEVICE_INLINE static void input(const Vector (&d)[kSize], Vector (&v)[kSize]) {
    PointTransform<kSize>::apply(d, v);
  }
  DEVICE_INLINE static void output(const Vector (&m)[kSize], Vector (&y)[kOutputs]) {
    OutputTransform<kSize, kOutputs>::apply(m, y);
  }
};

template <int kOutputs>
struct Line<kOutputs, 2> {
  static constexpr int kSize = 2 * kOutputs + 1;
  static constexpr int kEven = kOutputs + 1;
  DEVICE_INLINE static void input(const Vector (&d)[kSize], Vector (&v)[kSize]) {
    Vector even[kEven], points[kEven];
#pragma GCC unroll 5
    for (int i = 0; i < kEven; ++i) even[i] = d[2 * i];
    PointTransform<kEven>::apply(even, points);
#pragma GCC unroll 5
    for (int i = 0; i < kEven; ++i) v[i] = points[i];
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) v[kEven + i] = d[2 * i + 1];
  }
  DEVICE_INLINE static void output(const Vector (&m)[kSize], Vector (&y)[kOutputs]) {
    Vector even[kEven];
#pragma GCC unroll 5
    for (int i = 0; i < kEven; ++i) even[i] = m[i];
    OutputTransform<kEven, kOutputs>::apply(even, y);
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) y[i] += m[kEven + i];
  }
};

// A line of a tile's inputs and what it becomes (transform_chunk in winograd_tiles.h).
template <int kOutputs, int kStride>
struct InputLine {
  static constexpr int kIn = Line<kOutputs, kStride>::kSize, kOut = kIn;
  DEVICE_INLINE static void apply(const Vector (&d)[kIn], Vector (&v)[kOut]) {
    Line<kOutputs, kStride>::input(d, v);
  }
};
