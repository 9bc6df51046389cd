// Everything of the chip that C++ cannot say, by name: asynchronous copies, matrix products,
// barriers, shuffles. No other file of csrc/cuda/ holds an instruction or a CUDA built-in function.
//
// nvcc compiles what is here. Any other compiler takes the same names from hardware_on_cpu.h
// (tests/cuda_on_cpu), where a thread is a fiber, so that every kernel runs in the tests.
//
// Shared memory is dynamic only; shared_memory() is its start, aligned to 1024 bytes. Pointers into
// it are ordinary ones. wgmma, TMA's bulk copies and mbarriers need compute capability 9.0
// (RESNET_FUSED_SM90); the rest 8.0. By the PTX ISA, version 9.0; sections are named. The file is
// long because it is to be the only one.
#pragma once

#ifndef __CUDACC__
#include "hardware_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE_INLINE __device__ __forceinline__

// wgmma and setmaxnreg belong to sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RESNET_FUSED_SM90 1
#endif

namespace resnet_fused::cuda {

// --- launching ------------------------------------------------------------------------------

using Stream = cudaStream_t;

// Starts kernel(arguments...) with so many bytes of shared memory; the error's text, or nullptr.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   Stream stream, Arguments... arguments) {
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for (CUDA programming guide)
    // Always the same: threads that launch a kernel with other sizes may come in between.
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (status == cudaSuccess)
    kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t last = cudaGetLastError();  // and forgets it
  if (status == cudaSuccess) status = last;
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// --- threads --------------------------------------------------------------------------------

DEVICE_INLINE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char start[];
  return start;
}

// All threads of the block.
DEVICE_INLINE void sync_block() {
  __syncthreads();
}

DEVICE_INLINE void sync_warp() {
  __syncwarp();
}

// `threads` of the block, a multiple of 32, that name the same `barrier`, 1 to 15.
DEVICE_INLINE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The value of the lane whose number differs from one's own in the bits of `mask`.
template <class T>
DEVICE_INLINE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
DEVICE_INLINE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// `registers` a thread from here on, for a whole warpgroup.
template <int registers>
DEVICE_INLINE void take_registers() {
#ifdef RESNET_FUSED_SM90
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

template <int registers>
DEVICE_INLINE void give_registers() {
#ifdef RESNET_FUSED_SM90
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// --- numbers --------------------------------------------------------------------------------

using half = __half;
using bfloat16 = __nv_bfloat16;

DEVICE_INLINE float to_float(float x) {
  return x;
}
DEVICE_INLINE float to_float(half x) {
  return __half2float(x);
}
DEVICE_INLINE float to_float(bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
DEVICE_INLINE T rounded(float x);
template <>
DEVICE_INLINE float rounded<float>(float x) {
  return x;
}
template <>
DEVICE_INLINE half rounded<half>(float x) {
  return __float2half_rn(x);
}
template <>
DEVICE_INLINE bfloat16 rounded<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// To TF32's 10 bits of mantissa, to nearest, ties away from zero. A NaN of which only the low 13
// bits say so becomes an infinity, as it is to mma, which does not read them.
DEVICE_INLINE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// Two rounded numbers in a register, the first in the low half.
DEVICE_INLINE uint32_t pair(float first, float second, half) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
DEVICE_INLINE uint32_t pair(float first, float second, bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Both between those of `low` and `high`; NaN stays, and -0 becomes the 0 of a bound, as in
// PyTorch's relu on a GPU.
DEVICE_INLINE uint32_t clamp(uint32_t both, uint32_t low, uint32_t high, half) {
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(both) : "r"(low));
  asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(both) : "r"(high));
  return both;
}
DEVICE_INLINE uint32_t clamp(uint32_t both, uint32_t low, uint32_t high, bfloat16) {
  asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(both) : "r"(low));
  asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(both) : "r"(high));
  return both;
}

// One number.
DEVICE_INLINE uint32_t clamp(uint32_t number, uint32_t low, uint32_t high, float) {
  asm("max.NaN.f32 %0, %0, %1;" : "+r"(number) : "r"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+r"(number) : "r"(high));
  return number;
}

struct Pair {
  float first, second;
};

DEVICE_INLINE Pair unpair(uint32_t both, half) {
  const __half2 numbers = *reinterpret_cast<const __half2*>(&both);
  return {__low2float(numbers), __high2float(numbers)};
}
DEVICE_INLINE Pair unpair(uint32_t both, bfloat16) {
  const __nv_bfloat162 numbers = *reinterpret_cast<const __nv_bfloat162*>(&both);
  return {__low2float(numbers), __high2float(numbers)};
}

// --- memory ---------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

// Data that nobody reads again soon.
DEVICE_INLINE Bytes16 load_once(const void* from) {
  Bytes16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(from));
  return v;
}

// At once: of an assignment the compiler makes four where activations branch.
DEVICE_INLINE void store_16(void* to, const Bytes16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.words[0]),
               "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3])
               : "memory");
}

// Two numbers, aligned to 8 bytes, that nobody writes while the kernel runs.
DEVICE_INLINE Pair load_pair(const float* from) {
  const float2 both = __ldg(reinterpret_cast<const float2*>(from));
  return {both.x, both.y};
}

DEVICE_INLINE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, or 16 zeros (cp.async).
DEVICE_INLINE void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignore;\n"
      "}" ::"r"(shared_address(to)),
      "l"(from), "r"(static_cast<uint32_t>(valid))
      : "memory");
}

// Ends a group of a thread's copies.
DEVICE_INLINE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but this thread's `younger` last groups have arrived.
template <int younger>
DEVICE_INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(younger) : "memory");
}

// --- mma.sync (matrix fragments of a warp) --------------------------------------------------

// Four 8x8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
DEVICE_INLINE void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE_INLINE void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a (16x16) b (16x8), the last argument naming the dtype of a and b.
DEVICE_INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE_INLINE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a (16x8) b (8x8) in TF32: float32 whose low 13 bits are not read. The fragments are those of
// 16-bit numbers with one number in place of two, which ldmatrix_x4 loads as well.
DEVICE_INLINE void mma_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- mbarriers and bulk copies (9.0) --------------------------------------------------------

// In shared memory. A phase ends when `count` threads have arrived and all expected bytes are
// there; the first phase has parity 0.
struct Mbarrier {
  uint64_t state;
};

DEVICE_INLINE void mbarrier_init(Mbarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

// After mbarrier_init and before a sync_block: asynchronous copies see the barriers.
DEVICE_INLINE void mbarrier_init_done() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE_INLINE void mbarrier_arrive(Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Arrives, and the phase waits for so many bytes more.
DEVICE_INLINE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Until the phase of this parity has ended.
DEVICE_INLINE void mbarrier_wait(Mbarrier* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Whether it has, without waiting long.
DEVICE_INLINE bool mbarrier_ready(Mbarrier* barrier, int parity) {
  uint32_t ready = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(ready)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
#endif
  return ready != 0;
}

// `bytes`, a multiple of 16, from global to shared memory, both aligned to 16; counted by
// `barrier`.
DEVICE_INLINE void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}

// What this thread wrote to shared memory is seen by wgmma and bulk copies that follow a barrier.
DEVICE_INLINE void fence_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- wgmma (a warpgroup's matrix products, 9.0a) --------------------------------------------

// A matrix in shared memory without swizzle, K-major: 8 rows of 16 bytes (8 numbers of one row, of
// float32 4), 128 bytes in a row, are a core matrix; `along_k` bytes from it lies the one with the
// next columns, `along_rows` bytes from it the one with the next 8 rows. Section
// "Matrix-descriptor" of the ISA.
DEVICE_INLINE uint64_t matrix(const void* start, int along_k, int along_rows) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(start)) | field(along_k) << 16 | field(along_rows) << 32;
}

// The matrix so many bytes further on.
DEVICE_INLINE uint64_t matrix_at(uint64_t matrix, int bytes) {
  return matrix + static_cast<uint64_t>(bytes >> 4);
}

// Before the first product, and between writing accumulators otherwise and a product.
DEVICE_INLINE void wgmma_fence() {
#ifdef RESNET_FUSED_SM90
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

DEVICE_INLINE void wgmma_commit() {
#ifdef RESNET_FUSED_SM90
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all but the `younger` last groups are done.
template <int younger>
DEVICE_INLINE void wgmma_wait() {
#ifdef RESNET_FUSED_SM90
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(younger) : "memory");
#endif
}

// Products under way write these registers: nothing of them may be moved past this.
template <int n>
DEVICE_INLINE void wgmma_hold(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d (64 x columns) = a (64x16) b (16 x columns), plus d if `adds`; columns = 2n; float is TF32, of
// which a product takes 8 in place of 16 and reads no low 13 bits. Thread t of the
// warpgroup holds of row 16 (t / 32) + (t % 32) / 4 + 8 j the columns 8 i + 2 (t % 4) and the next
// in d[4 i + 2 j] and the next.
#ifdef RESNET_FUSED_SM90
#define RESNET_FUSED_ON_SM90(...) __VA_ARGS__
#else
#define RESNET_FUSED_ON_SM90(...)
#endif
#define RESNET_FUSED_EIGHT(i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define RESNET_FUSED_WGMMA(type, name, k, majors)                                               \
  DEVICE_INLINE void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool adds, type) {           \
    RESNET_FUSED_ON_SM90(asm volatile(                                                          \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n64k" k ".f32." name "." name                          \
        " {"                                                                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "     \
        "%32, %33, p, 1, 1" majors ";\n}" : RESNET_FUSED_EIGHT(0),                              \
        RESNET_FUSED_EIGHT(8), RESNET_FUSED_EIGHT(16), RESNET_FUSED_EIGHT(24) : "l"(a), "l"(b), \
        "r"(static_cast<int>(adds))));                                                          \
  }                                                                                             \
  DEVICE_INLINE void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool adds, type) {           \
    RESNET_FUSED_ON_SM90(asm volatile(                                                          \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n128k" k ".f32." name "." name                         \
        " {"                                                                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "      \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "      \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "     \
        "%64, %65, p, 1, 1" majors ";\n}" : RESNET_FUSED_EIGHT(0),                              \
        RESNET_FUSED_EIGHT(8), RESNET_FUSED_EIGHT(16), RESNET_FUSED_EIGHT(24),                  \
        RESNET_FUSED_EIGHT(32), RESNET_FUSED_EIGHT(40), RESNET_FUSED_EIGHT(48),                 \
        RESNET_FUSED_EIGHT(56) : "l"(a), "l"(b), "r"(static_cast<int>(adds))));                 \
  }

RESNET_FUSED_WGMMA(half, "f16", "16", ", 0, 0")
RESNET_FUSED_WGMMA(bfloat16, "bf16", "16", ", 0, 0")
RESNET_FUSED_WGMMA(float, "tf32", "8", "")
#undef RESNET_FUSED_WGMMA
#undef RESNET_FUSED_EIGHT
#undef RESNET_FUSED_ON_SM90

}  // namespace resnet_fused::cuda

#endif
