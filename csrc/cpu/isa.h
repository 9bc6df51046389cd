// Which instruction set the kernels run with: the best one of this CPU, or a lower one named by the
// environment variable RESNET_FUSED_CPU_ISA (avx512_bf16 | avx512 | avx2 | baseline).
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RESNET_FUSED_X86 1
#else
#define RESNET_FUSED_X86 0
#endif

// RESNET_FUSED_NO_AVX512 shortens a build under a sanitizer (setup.py).
#if RESNET_FUSED_X86 && !defined(RESNET_FUSED_NO_AVX512)
#define RESNET_FUSED_AVX512 1
#else
#define RESNET_FUSED_AVX512 0
#endif

namespace resnet_fused {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

Isa isa();  // decided once; throws if the environment names an unknown or unsupported one

}  // namespace resnet_fused

// function(...) of the namespace that was compiled for this CPU (see for_each_isa.h).
#if RESNET_FUSED_AVX512
#define RESNET_FUSED_CALL(function, ...) \
  (isa() >= Isa::avx512                  \
       ? avx512::function(__VA_ARGS__)   \
       : (isa() == Isa::avx2 ? avx2::function(__VA_ARGS__) : baseline::function(__VA_ARGS__)))
// The same for kernels that are compiled for AVX512_BF16 too (RESNET_FUSED_WITH_BF16).
#define RESNET_FUSED_CALL_BF16(function, ...)                     \
  (isa() == Isa::avx512_bf16 ? avx512_bf16::function(__VA_ARGS__) \
                             : RESNET_FUSED_CALL(function, __VA_ARGS__))
#elif RESNET_FUSED_X86
#define RESNET_FUSED_CALL(function, ...) \
  (isa() == Isa::avx2 ? avx2::function(__VA_ARGS__) : baseline::function(__VA_ARGS__))
#define RESNET_FUSED_CALL_BF16(function, ...) RESNET_FUSED_CALL(function, __VA_ARGS__)
#else
#define RESNET_FUSED_CALL(function, ...) (isa(), baseline::function(__VA_ARGS__))
#define RESNET_FUSED_CALL_BF16(function, ...) RESNET_FUSED_CALL(function, __VA_ARGS__)
#endif
