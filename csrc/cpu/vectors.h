// Vectors as wide as the instruction set's registers, in GCC's and Clang's vector extensions: one
// source for every instruction set, with + - * on whole registers.
// Included inside the namespace of one instruction set (for_each_isa.h), after simd.h.

constexpr int kLanes = RESNET_FUSED_VECTOR_BYTES / 4;

typedef float Vector __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES)));
typedef float UnalignedVector
    __attribute__((vector_size(RESNET_FUSED_VECTOR_BYTES), aligned(4), may_alias));

DEVICE_INLINE Vector load(const float* from) {
  return *reinterpret_cast<const UnalignedVector*>(from);
}
DEVICE_INLINE void store(float* to, Vector value) {
  *reinterpret_cast<UnalignedVector*>(to) = value;
}
DEVICE_INLINE Vector all(float value) {
  return value - Vector{};
}
