// One panel's weights as an algorithm packs them.
// Included inside the namespace of one instruction set (for_each_isa.h).

#include "vectors.h"
#include "gather_weights.h"
#include "winograd_weights.h"

// For F(4 x 4, 3 x 3): [weight][channel][32], each weight `slice` floats after the last.
// `taps` holds part.channels * 9 * 32 floats meanwhile.
inline void transform_panel(const WeightView& w, const PanelPart& part, int64_t stride,
                            int64_t slice, float* taps, float* to) {
  gather_panel(w, part, {9 * kPanel, kPanel}, taps);
  if (stride == 2) {
    transform_weights<2>(taps, part.channels, slice, to);
  } else {
    transform_weights<1>(taps, part.channels, slice, to);
  }
}

#if RESNET_FUSED_BF16_INSTRUCTIONS
// [channel][32] floats, `count` of them, to [pair of channels][32] words; an odd last one is paired
// with zeros.
inline void pack_pairs(const float* rows, int64_t count, bf16* to) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t c = 0; c < count; c += 2) {
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const float* const row = rows + c * kPanel + lane;
      const Vector first = load(row), second = c + 1 < count ? load(row + kPanel) : Vector{};
      const __m512i both =
          bits_as<__m512i>(_mm512_cvtne2ps_pbh(bits_as<__m512>(second), bits_as<__m512>(first)));
      _mm512_storeu_si512(to + (c * kPanel + 2 * lane), _mm512_permutexvar_epi16(order, both));
    }
  }
}
#else
inline void pack_pairs(const float*, int64_t, bf16*) {}  // never called: nothing multiplies pairs
#endif

inline auto gather_panel_kernel() {
  return &gather_panel;
}
inline auto transform_panel_kernel() {
  return &transform_panel;
}
inline auto pack_pairs_kernel() {
  return &pack_pairs;
}
