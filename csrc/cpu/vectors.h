// Vectors as wide as the instruction set's registers, in GCC's and Clang's vector extensions: one
// source for every instruction set, with + - * on whole registers.
// Included inside the namespace of one instruction set (for_each_isa.h), after simd.h.

constexpr int kLanes = RESNET_FUSED_VECTOR_BYTES / 4;

typedef float Vector __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES)));
typedef float UnalignedVector
    __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES), aligned(4), may_alias));

typedef uint32_t WordVector __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES)));
typedef uint16_t HalfVector __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalfVector
    __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES / 2), aligned(2), may_alias));

DEVICE_INLINE Vector load(const float* from) {
  return *reinterpret_cast<const UnalignedVector*>(from);
}
DEVICE_INLINE void store(float* to, Vector value) {
  *reinterpret_cast<UnalignedVector*>(to) = value;
}
DEVICE_INLINE Vector load(const bf16* from) {
  const HalfVector bits = *reinterpret_cast<const UnalignedHalfVector*>(from);
  return bits_as<Vector>(__builtin_convertvector(bits, WordVector) << 16);
}
// Round to nearest even, as narrow() in simd.h.
DEVICE_INLINE void store(bf16* to, Vector value) {
#if RESNET_FUSED_BF16_INSTRUCTIONS
  // One instruction instead of nine; numbers below 2^-126 become 0, as in oneDNN.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      bits_as<__m256i>(_mm512_cvtneps_pbh(bits_as<__m512>(value))));
#else
  const WordVector bits = bits_as<WordVector>(value);
  const WordVector rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const WordVector kept = value == value ? rounded : WordVector{} + 0x7FC0u;
  *reinterpret_cast<UnalignedHalfVector*>(to) = __builtin_convertvector(kept, HalfVector);
#endif
}
#if RESNET_FUSED_BF16_INSTRUCTIONS
// A word of each lane of two vectors: first's numbers low.
DEVICE_INLINE void store_pairs(float* to, Vector first, Vector second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both =
      bits_as<__m512i>(_mm512_cvtne2ps_pbh(bits_as<__m512>(second), bits_as<__m512>(first)));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}
#endif
DEVICE_INLINE Vector all(float value) {
  return value - Vector{};
}

DEVICE_INLINE float as_float(float value) {
  return value;
}
DEVICE_INLINE float as_float(bf16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}
