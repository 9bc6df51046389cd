// Sums per channel. Included inside the namespace of one instruction set, after simd.h.
// A few rows are added in float as a tree, then to a double: the error stays near one rounding.

template <class A>
struct Two {
  A first, second;
  DEVICE_INLINE Two operator+(const Two& other) const {
    return {first + other.first, second + other.second};
  }
};

template <int count, class F>
DEVICE_INLINE auto add_tree(const F& value, int64_t first, int64_t stride, int64_t column) {
  if constexpr (count == 1) {
    return value(first + column, column);
  } else {
    return add_tree<count / 2>(value, first, stride, column) +
           add_tree<count / 2>(value, first + count / 2 * stride, stride, column);
  }
}

// first[j] += the sum over `rows` rows of value(index, column j).first, and likewise second.
template <int rows_at_once, class F>
DEVICE_INLINE void add_rows(const F& value, int64_t index, int64_t rows, int64_t columns,
                            double* __restrict first, double* __restrict second) {
  int64_t row = 0;
  for (; row + rows_at_once <= rows; row += rows_at_once) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const auto sum = add_tree<rows_at_once>(value, index + row * columns, columns, j);
      first[j] += sum.first;
      second[j] += sum.second;
    }
  }
  for (; row < rows; ++row) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const auto term = value(index + row * columns + j, j);
      first[j] += term.first;
      second[j] += term.second;
    }
  }
}

template <int rows_at_once, class F>
DEVICE_INLINE void add_to_channels(const Tile& tile, AlongChannels, const F& value, double* first,
                                   double* second) {
  add_rows<rows_at_once>(value, 0, tile.rows, tile.columns, first, second);
}

// A run within one channel is taken as rows of kLanes, whose sums are added up at the end: plain
// scalar reductions are not vectorised once an activation's selects are in them (GCC 12).
template <int rows_at_once, class F>
DEVICE_INLINE void add_to_channels(const Tile& tile, WithinChannel, const F& value, double* first,
                                   double* second) {
  constexpr int64_t kLanes = 32;
  double lanes[2][kLanes] = {};
  const int64_t rows = tile.columns / kLanes;
  add_rows<rows_at_once>(value, 0, rows, kLanes, lanes[0], lanes[1]);
  add_rows<1>(value, rows * kLanes, 1, tile.columns - rows * kLanes, lanes[0], lanes[1]);
  for (int64_t j = 0; j < kLanes; ++j) {
    *first += lanes[0][j];
    *second += lanes[1][j];
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
