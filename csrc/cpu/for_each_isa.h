// Compiles KERNEL_HEADER once per instruction set, each time in a namespace of that name:
//
//     #define KERNEL_HEADER "bn_act_kernel.h"
//     #include "for_each_isa.h"
//
// setuptools gives all sources the same flags, so the target is set by pragma. Standard headers
// come before it: an inline function of theirs must not be compiled for a CPU that may not be
// there. Kernels are leaves: plain pointers in and out, no allocation, no exceptions, no torch.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "kernel_types.h"

#if RESNET_FUSED_X86
#include <immintrin.h>
#endif

#define RESNET_FUSED_F16C 0
#define RESNET_FUSED_BF16_INSTRUCTIONS 0
#define RESNET_FUSED_VECTOR_BYTES 16
namespace resnet_fused::baseline {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace resnet_fused::baseline
#undef RESNET_FUSED_F16C
#undef RESNET_FUSED_VECTOR_BYTES

#if RESNET_FUSED_X86
#define RESNET_FUSED_F16C 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define RESNET_FUSED_VECTOR_BYTES 32
namespace resnet_fused::avx2 {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace resnet_fused::avx2
#undef RESNET_FUSED_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if RESNET_FUSED_AVX512
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define RESNET_FUSED_VECTOR_BYTES 64
namespace resnet_fused::avx512 {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace resnet_fused::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(RESNET_FUSED_WITH_BF16)
#undef RESNET_FUSED_BF16_INSTRUCTIONS
#define RESNET_FUSED_BF16_INSTRUCTIONS 1
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
namespace resnet_fused::avx512_bf16 {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace resnet_fused::avx512_bf16
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif  // RESNET_FUSED_AVX512

#undef RESNET_FUSED_F16C
#undef RESNET_FUSED_VECTOR_BYTES
#endif  // RESNET_FUSED_X86
#undef RESNET_FUSED_BF16_INSTRUCTIONS
#undef KERNEL_HEADER
