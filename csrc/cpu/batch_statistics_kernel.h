// Included inside the namespace of one instruction set, after simd.h.

#include "channel_sums.h"

template <class A>
void add_samples(const Tile& tile, const A* x, double* sum) {
  by_direction(tile.along, [&](auto direction) __attribute__((always_inline)) {
    const auto value = [&](int64_t row, int64_t j) __attribute__((always_inline)) {
      return Two<A>{x[row * tile.columns + j], A(0)};
    };
    add_to_channels<A, false>(tile, direction, value, sum, nullptr);
  });
}

template <class A>
void add_deviations(const Tile& tile, const A* x, const double* centers, double* deviation,
                    double* moment) {
  by_direction(tile.along, [&](auto direction) __attribute__((always_inline)) {
    const auto center = direction(centers, 0);
    const auto value = [&](int64_t row, int64_t j) __attribute__((always_inline)) {
      const A d = x[row * tile.columns + j] - static_cast<A>(center[j]);
      return Two<A>{d, d * d};
    };
    add_to_channels<A, true>(tile, direction, value, deviation, moment);
  });
}

template <class T>
void partial_statistics(const PartialStatistics& partial, const Chunks& chunks, int64_t begin,
                        int64_t end) {
  using A = compute_t<T>;
  const T* input = static_cast<const T*>(partial.input);
  const int64_t width = chunks.extent.inner == 1 ? chunks.extent.channels : 1;
  Input<T> buffer;
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit = chunks.unit(u);
    for_tiles_of<T>(unit, chunks.extent, [&](const Tile& tile, int64_t index) {
      add_samples<A>(tile, buffer.read(input + tile.offset, tile.rows * tile.columns),
                     partial.mean + index);
    });
    double* mean = partial.mean + unit.index;
    const double length = static_cast<double>(unit.length);
    for (int64_t j = 0; j < width; ++j)
      mean[j] = static_cast<double>(static_cast<A>(mean[j] / length));
    for_tiles_of<T>(unit, chunks.extent, [&](const Tile& tile, int64_t index) {
      add_deviations<A>(tile, buffer.read(input + tile.offset, tile.rows * tile.columns),
                        partial.mean + index, partial.deviation + index, partial.moment + index);
    });
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
