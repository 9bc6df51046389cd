// One panel's weights brought together from where the model has them.
// Included inside the namespace of one instruction set (for_each_isa.h), after vectors.h.

#include "transpose.h"

// Numbers that lie side by side, `count` of them for each of kLanes outputs; number i goes to
// place(i), as the lanes of one vector.
template <class Place>
void gather_runs(const float* from, int64_t output_stride, int64_t count, const Place& place) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector rows[kLanes];
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) rows[n] = load(from + n * output_stride + i);
    transpose(rows);
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) store(place(i + n), rows[n]);
  }
  for (; i < count; ++i) {
    float* const to = place(i);
    for (int n = 0; n < kLanes; ++n) to[n] = from[n * output_stride + i];
  }
}

// kLanes outputs from `output` on, of which `columns` are there.
inline void gather_lanes(const WeightView& w, const PanelPart& part, int64_t output,
                         int64_t columns, const PanelSteps& steps, float* to) {
  const int64_t taps = w.taps();
  const float* const from =
      w.data + part.group * w.group_stride + output * w.output_stride + part.first * w.input_stride;
  const auto tap_offset = [&](int64_t t) {
    return t / w.kernel[1] * w.tap_stride[0] + t % w.kernel[1] * w.tap_stride[1];
  };
  const bool whole = columns >= kLanes;
  if (whole && w.input_stride == 1) {
    for (int64_t t = 0; t < taps; ++t) {
      gather_runs(from + tap_offset(t), w.output_stride, part.channels,
                  [&](int64_t i) { return to + i * steps.channel + t * steps.tap; });
    }
  } else if (whole && w.tap_stride[1] == 1 && w.tap_stride[0] == w.kernel[1] &&
             w.input_stride == taps) {
    gather_runs(from, w.output_stride, part.channels * taps,
                [&](int64_t i) { return to + i / taps * steps.channel + i % taps * steps.tap; });
  } else {
    for (int64_t c = 0; c < part.channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        const float* const source = from + c * w.input_stride + tap_offset(t);
        float* const target = to + c * steps.channel + t * steps.tap;
        if (whole && w.output_stride == 1) {
          store(target, load(source));
        } else {
          for (int n = 0; n < kLanes; ++n) {
            target[n] = n < columns ? source[n * w.output_stride] : 0.0f;
          }
        }
      }
    }
  }
}

// [channel][tap][32], or whatever else the steps say.
inline void gather_panel(const WeightView& w, const PanelPart& part, const PanelSteps& steps,
                         float* to) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const int64_t output = part.panel * kPanel + lane;
    gather_lanes(w, part, output, w.outputs - output, steps, to + lane);
  }
}
