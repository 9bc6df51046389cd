// Sums per channel. Included inside the namespace of one instruction set, after simd.h.
// Four rows are added in float as a tree, then to a double: the error stays near one rounding.

template <class A>
struct Two {
  A first, second;
  DEVICE_INLINE Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
  }
};

template <int count, class F>
DEVICE_INLINE auto add_tree(const F& value, int64_t row) {
  if constexpr (count == 1) {
    return value(row);
  } else {
    return add_tree<count / 2>(value, row) + add_tree<count / 2>(value, row + count / 2);
  }
}

// first[j] += sum over rows of value(row, j).first, and likewise second unless it is not wanted.
template <class A, bool both, class F>
DEVICE_INLINE void add_to_channels(const Tile& tile, AlongChannels, const F& value,
                                   double* __restrict first, double* __restrict second) {
  const auto add_rows = [&](auto count, int64_t row) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t j = 0; j < tile.columns; ++j) {
      const auto sum = add_tree<decltype(count)::value>(
          [&](int64_t r) __attribute__((always_inline)) { return value(r, j); }, row);
      first[j] += sum.first;
      if (both) second[j] += sum.second;
    }
  };
  int64_t row = 0;
  for (; row + 4 <= tile.rows; row += 4) add_rows(std::integral_constant<int, 4>{}, row);
  for (; row < tile.rows; ++row) add_rows(std::integral_constant<int, 1>{}, row);
}

template <class A, bool both, class F>
DEVICE_INLINE void add_to_channels(const Tile& tile, WithinChannel, const F& value, double* first,
                                   double* second) {
  constexpr int64_t kRun = 256;  // at most 16 terms to a lane of 16 floats
  for (int64_t begin = 0; begin < tile.columns; begin += kRun) {
    const int64_t end = kRun < tile.columns - begin ? begin + kRun : tile.columns;
    A sum1 = 0, sum2 = 0;
#pragma omp simd reduction(+ : sum1, sum2)
    for (int64_t j = begin; j < end; ++j) {
      const auto term = value(0, j);
      sum1 += term.first;
      if (both) sum2 += term.second;
    }
    *first += static_cast<double>(sum1);
    if (both) *second += static_cast<double>(sum2);
  }
}

// body(tile, index) over the tiles of one unit; partial results of the tile's first column belong
// at [index].
template <class T, class Body>
DEVICE_INLINE void for_tiles_of(const Unit& unit, const Extent& extent, const Body& body) {
  const auto with_index = [&](const Tile& tile) __attribute__((always_inline)) {
    body(tile, unit.index + tile.channel - unit.channel);
  };
  if (extent.inner == 1) {
    for_tiles_along<T>(extent.channels, unit.begin, unit.begin + unit.length, with_index);
  } else {
    for_tiles_within(unit.channel, unit.begin, unit.begin + unit.length, with_index);
  }
}
