// Weights of F(4 x 4, 3 x 3) transformed in the call: U = G w G^T, in float32. In inference memory
// delivers the nine taps of many channels sooner than the 36 weights, and the difference pays for
// this; in training the weights are new at every call.
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
