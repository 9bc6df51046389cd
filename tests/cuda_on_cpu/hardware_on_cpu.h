// The names of csrc/cuda/hardware.cuh for a compiler that knows no CUDA: the tests run the kernels
// of csrc/cuda/ on the CPU with them.
//
// A thread is a fiber, the blocks of a grid run one after another, and shared memory is one arena
// (runtime.h and the .cpp files beside it, which hold everything that is not a template). What a
// kernel must not do is an error that names the place: barriers that not all threads reach, copies
// and products nobody waits for, misaligned or out-of-bounds accesses. What an instruction has not
// yet written is NaN, so that what is read too early shows in the results.
//
// Not modelled: how mma and wgmma round, memory ordering between blocks, caches, registers, speed.
// A kernel that waits for another block never ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// The toolkit's headers have defined these for the host's compiler.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE_INLINE inline

#define RESNET_FUSED_SM90 1

#pragma GCC visibility push(default)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace resnet_fused::cuda {

// The line of the kernel that a checker's message names.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// --- launching ------------------------------------------------------------------------------

struct Stream {};

// Runs the grid to its end; the text of the error that CUDA would give, or nullptr. What the
// checker finds is thrown.
const char* launch_on_cpu(dim3 grid, dim3 block, size_t shared_bytes,
                          void (*thread)(const void* kernel), const void* kernel);

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   Stream, Arguments... arguments) {
  using Values = std::tuple<std::remove_cv_t<Parameters>...>;
  struct Call {
    void (*kernel)(Parameters...);
    Values values;
  };
  const Call call{kernel, Values(static_cast<std::remove_cv_t<Parameters>>(arguments)...)};
  return launch_on_cpu(
      grid, block, shared_bytes,
      [](const void* pointer) {
        const Call& it = *static_cast<const Call*>(pointer);
        std::apply(it.kernel, it.values);
      },
      &call);
}

int multiprocessors();

// --- threads --------------------------------------------------------------------------------

unsigned char* shared_memory();
void sync_block(Site site = Site::here());
void sync_warp(Site site = Site::here());
void sync_some(int barrier, int threads, Site site = Site::here());

uint64_t shuffled(uint64_t bits, int lane, const char* name, Site site);
int lane_number();

template <class T>
T shuffle(T value, int lane, Site site = Site::here()) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffled(bits, lane, "shuffle", site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle_xor(T value, int mask, Site site = Site::here()) {
  return shuffle(value, lane_number() ^ mask, site);
}

void take_registers_of(int registers, Site site);
template <int registers>
void take_registers(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  take_registers_of(registers, site);
}

void give_registers_of(int registers, Site site);
template <int registers>
void give_registers(Site site = Site::here()) {
  static_assert(registers % 8 == 0 && registers >= 24 && registers <= 256);
  give_registers_of(registers, site);
}

// --- numbers --------------------------------------------------------------------------------

using half = __half;
using bfloat16 = __nv_bfloat16;

inline float to_float(float x) {
  return x;
}
inline float to_float(half x) {
  return __half2float(x);
}
inline float to_float(bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) {
  return x;
}
template <>
inline half rounded<half>(float x) {
  return __float2half_rn(x);
}
template <>
inline bfloat16 rounded<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// What ptxas makes of cvt.rna.tf32.f32 for 8.0 to 10.0.
inline float round_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (std::abs(x) < INFINITY) bits += 0x1000;
  bits &= 0xffffe000;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class T>
uint32_t pair_of(float first, float second) {
  const T both[2] = {rounded<T>(first), rounded<T>(second)};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}
inline uint32_t pair(float first, float second, half) {
  return pair_of<half>(first, second);
}
inline uint32_t pair(float first, float second, bfloat16) {
  return pair_of<bfloat16>(first, second);
}

struct Pair {
  float first, second;
};

template <class T>
Pair unpair_of(uint32_t bits) {
  T both[2];
  std::memcpy(both, &bits, sizeof(bits));
  return {to_float(both[0]), to_float(both[1])};
}
inline Pair unpair(uint32_t both, half) {
  return unpair_of<half>(both);
}
inline Pair unpair(uint32_t both, bfloat16) {
  return unpair_of<bfloat16>(both);
}

// --- memory ---------------------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

void check_aligned(const void* pointer, uintptr_t alignment, const char* name, Site site);

inline Bytes16 load_once(const void* from, Site site = Site::here()) {
  check_aligned(from, 16, "load_once", site);
  return *static_cast<const Bytes16*>(from);
}

inline void store_16(void* to, const Bytes16& bytes, Site site = Site::here()) {
  check_aligned(to, 16, "store_16", site);
  *static_cast<Bytes16*>(to) = bytes;
}

inline float clamp_one(float v, float least, float most) {
  if (v != v) return v;
  const float up = v > least ? v : least;
  return up < most ? up : most;
}
template <class T>
uint32_t clamp(uint32_t both, uint32_t low, uint32_t high, T) {
  const Pair x = unpair(both, T()), from = unpair(low, T()), to = unpair(high, T());
  return pair(clamp_one(x.first, from.first, to.first), clamp_one(x.second, from.second, to.second),
              T());
}
inline uint32_t clamp(uint32_t number, uint32_t low, uint32_t high, float) {
  float numbers[3];
  const uint32_t words[3] = {number, low, high};
  std::memcpy(numbers, words, sizeof(words));
  const float clamped = clamp_one(numbers[0], numbers[1], numbers[2]);
  std::memcpy(&number, &clamped, sizeof(number));
  return number;
}

inline Pair load_pair(const float* from, Site site = Site::here()) {
  check_aligned(from, 8, "load_pair", site);
  return {from[0], from[1]};
}

uint32_t shared_address(const void* pointer, Site site = Site::here());

void cp_async_16(void* to, const void* from, bool valid, Site site = Site::here());
void cp_async_commit(Site site = Site::here());
void cp_async_wait_for(int younger, Site site);
template <int younger>
void cp_async_wait(Site site = Site::here()) {
  static_assert(younger >= 0);
  cp_async_wait_for(younger, site);
}

// --- mma.sync -------------------------------------------------------------------------------

void ldmatrix_x4(uint32_t (&to)[4], const void* row, Site site = Site::here());
void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row, Site site = Site::here());
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half,
               Site site = Site::here());
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16,
               Site site = Site::here());

void mma_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
              Site site = Site::here());

// --- mbarriers and bulk copies --------------------------------------------------------------

// What the barrier knows lies elsewhere; here is a mark that it has been initialised.
struct Mbarrier {
  uint64_t state;
};

void mbarrier_init(Mbarrier* barrier, int count, Site site = Site::here());
void mbarrier_init_done(Site site = Site::here());
void mbarrier_arrive(Mbarrier* barrier, Site site = Site::here());
void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, Site site = Site::here());
void mbarrier_wait(Mbarrier* barrier, int parity, Site site = Site::here());
bool mbarrier_ready(Mbarrier* barrier, int parity, Site site = Site::here());
void bulk_copy(void* to, const void* from, int bytes, Mbarrier* barrier, Site site = Site::here());
void fence_async(Site site = Site::here());

// --- wgmma ----------------------------------------------------------------------------------

uint64_t matrix(const void* start, int along_k, int along_rows, Site site = Site::here());
uint64_t matrix_at(uint64_t matrix, int bytes, Site site = Site::here());
void wgmma_fence(Site site = Site::here());
void wgmma_commit(Site site = Site::here());
void wgmma_wait_for(int younger, Site site);
template <int younger>
void wgmma_wait(Site site = Site::here()) {
  static_assert(younger >= 0 && younger <= 7);
  wgmma_wait_for(younger, site);
}

template <int n>
void wgmma_hold(float (&)[n]) {}

enum class Operand { float16, bfloat16, tf32 };
template <class T>
constexpr Operand operand_of = std::is_same_v<T, half>       ? Operand::float16
                               : std::is_same_v<T, bfloat16> ? Operand::bfloat16
                                                             : Operand::tf32;

void wgmma_of(float* d, int n, uint64_t a, uint64_t b, bool adds, Operand operand, Site site);

template <int n, class T>
void wgmma(float (&d)[n], uint64_t a, uint64_t b, bool adds, T, Site site = Site::here()) {
  static_assert(n == 32 || n == 64);
  static_assert(sizeof(T) == 2 || std::is_same_v<T, float>);
  wgmma_of(d, n, a, b, adds, operand_of<T>, site);
}

}  // namespace resnet_fused::cuda

#pragma GCC visibility pop

// --- what CUDA has and C++ has not ----------------------------------------------------------

inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline uint32_t __float_as_uint(float x) {
  return same_bits<uint32_t>(x);
}
inline int __float_as_int(float x) {
  return same_bits<int>(x);
}
inline float __uint_as_float(uint32_t x) {
  return same_bits<float>(x);
}
inline float __int_as_float(int x) {
  return same_bits<float>(x);
}
