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

inline auto gather_panel_kernel() {
  return &gather_panel;
}
inline auto transform_panel_kernel() {
  return &transform_panel;
}
