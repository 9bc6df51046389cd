// Included inside the namespace of one instruction set, after simd.h.

#include "channel_sums.h"

// deviation += sum of x - shift, moment += sum of (x - shift)^2
template <class T>
void add_deviations(const Tile& tile, const T* x, const double* shifts, double* deviation,
                    double* moment) {
  using A = compute_t<T>;
  by_direction(tile.along, [&](auto direction) __attribute__((always_inline)) {
    const auto shift = direction(shifts, 0);
    const auto value = [&](int64_t i, int64_t j) __attribute__((always_inline)) {
      const A d = widened(x[i]) - static_cast<A>(shift[j]);
      return Two<A>{d, d * d};
    };
    add_to_channels<8>(tile, direction, value, deviation, moment);
  });
}

template <class T>
void partial_statistics(const PartialStatistics& partial, const Chunks& chunks, int64_t begin,
                        int64_t end) {
  using A = compute_t<T>;
  const T* input = static_cast<const T*>(partial.input);
  const int64_t width = chunks.extent.inner == 1 ? chunks.extent.channels : 1;
  Input<T> buffer;
  const auto add = [&](const Unit& unit) {
    for_tiles_of<T>(unit, chunks.extent, [&](const Tile& tile, int64_t index) {
      add_deviations<tile_t<T>>(tile, buffer.read(input, tile), partial.shift + index,
                                partial.deviation + index, partial.moment + index);
    });
  };
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = chunks.unit(u);
    double* shift = partial.shift + unit.index;
    double* deviation = partial.deviation + unit.index;
    double* moment = partial.moment + unit.index;

    Unit sample = unit;
    sample.length = unit.length / 64 > 8 ? unit.length / 64 : 8;
    if (sample.length > unit.length) sample.length = unit.length;
    add(sample);
    for (int64_t j = 0; j < width; ++j) {
      const double mean = deviation[j] / static_cast<double>(sample.length);
      shift[j] = mean - mean == 0.0 ? static_cast<A>(mean) : 0;  // no infinity minus another
      deviation[j] = moment[j] = 0;
    }
    add(unit);
  }
}

using PartialStatisticsKernel = void (*)(const PartialStatistics&, const Chunks&, int64_t, int64_t);

inline PartialStatisticsKernel partial_statistics_kernel(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return &partial_statistics<float>;
    case ScalarType::Double: return &partial_statistics<double>;
    case ScalarType::BFloat16: return &partial_statistics<bf16>;
    default: return &partial_statistics<f16>;
  }
}
