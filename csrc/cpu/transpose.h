// A square of numbers turned in registers: as many vectors as a vector has lanes.
// Included inside the namespace of one instruction set (for_each_isa.h), after vectors.h.

// Of a and b the lanes without the bit `kDistance` (or with it), b's after a's.
template <int kDistance, bool kUpper, int... kLane>
DEVICE_INLINE Vector exchange(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b,
                                 (kLane & kDistance ? kLanes + kLane - (kUpper ? 0 : kDistance)
                                                    : kLane + (kUpper ? kDistance : 0))...);
}

template <int kDistance>
DEVICE_INLINE void exchange_blocks(Vector (&rows)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const Vector a = rows[i], b = rows[i + kDistance];
    rows[i] = exchange<kDistance, false>(a, b, lanes);
    rows[i + kDistance] = exchange<kDistance, true>(a, b, lanes);
  }
  if constexpr (kDistance > 1) exchange_blocks<kDistance / 2>(rows);
}

// Row r's lane l and row l's lane r change places.
DEVICE_INLINE void transpose(Vector (&rows)[kLanes]) {
  exchange_blocks<kLanes / 2>(rows);
}
