// Weights transformed in the call: U = G w G^T, in float32. In inference memory delivers the nine
// taps of many channels sooner than the 36 weights, and the difference pays for this; in training
// the weights are new at every call.
// Included inside the namespace of one instruction set (for_each_isa.h), after vectors.h.

// What the three taps of a line become (winograd_transform.h): a polynomial's even and odd part
// give its values at p and at -p. With stride 2 the even inputs' kernel is g[0] + g[2] p, and the
// odd ones' g[1].
template <int kStride>
DEVICE_INLINE void transform_taps(const Vector (&g)[3], Vector (&u)[6]) {
  constexpr int kFinite = kStride == 2 ? 4 : 5;
  constexpr float a = kWinogradPoints[1], b = kWinogradPoints[3];
  const Vector even_a = kStride == 2 ? g[0] : g[0] + g[2] * (a * a);
  const Vector even_b = kStride == 2 ? g[0] : g[0] + g[2] * (b * b);
  const Vector odd = kStride == 2 ? g[2] : g[1];
  u[0] = g[0];
  u[1] = even_a + odd * a;
  u[2] = even_a - odd * a;
  u[3] = even_b + odd * b;
  if (kFinite == 5) u[4] = even_b - odd * b;
  u[kFinite] = g[2];
  if (kStride == 2) u[5] = g[1];
}

// [channel][tap][32] to [weight][channel][32], each weight `slice` floats after the last.
template <int kStride>
void transform_weights(const float* taps, int64_t channels, int64_t slice, float* weights) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* const from = taps + c * 9 * kPanel + lane;
      float* const to = weights + c * kPanel + lane;
      Vector half[3][6];
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const Vector g[3] = {load(from + x * kPanel), load(from + (3 + x) * kPanel),
                             load(from + (6 + x) * kPanel)};
        transform_taps<kStride>(g, half[x]);
      }
#pragma GCC unroll 6
      for (int y = 0; y < 6; ++y) {
        const Vector g[3] = {half[0][y], half[1][y], half[2][y]};
        Vector u[6];
        transform_taps<kStride>(g, u);
#pragma GCC unroll 6
        for (int x = 0; x < 6; ++x) store(to + (y * 6 + x) * slice, u[x]);
      }
    }
  }
}

#if RESNET_FUSED_BF16_INSTRUCTIONS
// The same of F(kLargest x kLargest), whose weights are some of F(4 x 4)'s, rounded to bfloat16: to
// [weight][pair of channels][32]. `channels` is even.
template <int kStride, int kLargest>
void transform_weight_pairs(const float* taps, int64_t channels, int64_t slice, float* weights) {
  constexpr int kCount = kLargest + 2, kFinite = kStride == 2 ? kLargest : kLargest + 1;
  const auto transform = [](const float* from,
                            Vector(&u)[kCount][kCount]) __attribute__((always_inline)) {
    const auto along = [](const Vector(&g)[3], Vector(&line)[kCount])
                           __attribute__((always_inline)) {
                             Vector all_of[6];
                             transform_taps<kStride>(g, all_of);
#pragma GCC unroll 5
                             for (int i = 0; i < kCount; ++i)
                               line[i] = all_of[i < kFinite ? i : i - kCount + 6];
                           };
    Vector half[3][kCount];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      along({load(from + x * kPanel), load(from + (3 + x) * kPanel), load(from + (6 + x) * kPanel)},
            half[x]);
    }
#pragma GCC unroll 5
    for (int y = 0; y < kCount; ++y) along({half[0][y], half[1][y], half[2][y]}, u[y]);
  };
  for (int64_t c = 0; c < channels; c += 2) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* const from = taps + c * 9 * kPanel + lane;
      Vector first[kCount][kCount], second[kCount][kCount];
      transform(from, first);
      transform(from + 9 * kPanel, second);
      float* const to = weights + c / 2 * kPanel + lane;
#pragma GCC unroll 5
      for (int y = 0; y < kCount; ++y) {
#pragma GCC unroll 5
        for (int x = 0; x < kCount; ++x) {
          store_pairs(to + (y * kCount + x) * slice, first[y][x], second[y][x]);
        }
      }
    }
  }
}
#endif
