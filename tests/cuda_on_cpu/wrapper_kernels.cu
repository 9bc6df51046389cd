// A kernel for every instruction of hardware_on_cpu.h, which tests/test_cuda_on_cpu.py compares
// with what PyTorch makes of the same.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

#include "hardware_on_cpu.h"

namespace resnet_fused::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parameters, class... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
           Arguments... arguments) {
  const char* error = launch(kernel, grid, block, shared, Stream(), arguments...);
  if (error != nullptr) throw std::runtime_error(error);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<Tensor&>(tensor).mutable_data_ptr());
}

// --- who is who -----------------------------------------------------------------------------

struct Index {
  int32_t thread[3], block[3], block_size[3], grid_size[3];
};

__global__ void indices_kernel(Index* out) {
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const auto three = [](int32_t (&to)[3], auto from) {
    to[0] = static_cast<int32_t>(from.x);
    to[1] = static_cast<int32_t>(from.y);
    to[2] = static_cast<int32_t>(from.z);
  };
  Index& own = out[block * blockDim.x * blockDim.y * blockDim.z + thread];
  three(own.thread, threadIdx);
  three(own.block, blockIdx);
  three(own.block_size, blockDim);
  three(own.grid_size, gridDim);
}

void indices(const Tensor& out, const std::vector<int64_t>& grid,
             const std::vector<int64_t>& block) {
  const auto size = [](const std::vector<int64_t>& n) {
    return dim3(static_cast<unsigned>(n[0]), static_cast<unsigned>(n[1]),
                static_cast<unsigned>(n[2]));
  };
  start(indices_kernel, size(grid), size(block), 0, data<Index>(out));
}

// A byte of every `pitch`, each by a block of its own.
__global__ void mark_kernel(uint8_t* out, int64_t pitch) {
  out[blockIdx.x * pitch] = 1;
}

void mark(const Tensor& out, int64_t pitch) {
  start(mark_kernel, dim3(static_cast<unsigned>(out.numel() / pitch)), dim3(1), 0,
        data<uint8_t>(out), pitch);
}

// --- shuffles and barriers ------------------------------------------------------------------

__global__ void shuffles_kernel(const float* x, float* rotated, double* swapped) {
  const int i = threadIdx.x, lane = i % 32;
  rotated[i] = shuffle(x[i], (lane + 1) % 32);
  swapped[i] = shuffle_xor(static_cast<double>(x[i]), 5);
}

void shuffles(const Tensor& x, const Tensor& rotated, const Tensor& swapped) {
  start(shuffles_kernel, dim3(1), dim3(static_cast<unsigned>(x.numel())), 0, data<float>(x),
        data<float>(rotated), data<double>(swapped));
}

// x reversed three times: by the block, by each warp, and by pairs of warps.
__global__ void reversals_kernel(const int* x, int* out) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const int n = blockDim.x, i = threadIdx.x;
  shared[i] = x[i];
  sync_block();
  int value = shared[n - 1 - i];
  sync_block();
  shared[i] = value;
  sync_warp();
  value = shared[i / 32 * 32 + 31 - i % 32];
  sync_warp();
  shared[i] = value;
  sync_some(1 + i / 64, 64);
  value = shared[i / 64 * 64 + 63 - i % 64];
  sync_some(1 + i / 64, 64);
  out[i] = value;
}

void reversals(const Tensor& x, const Tensor& out) {
  const auto n = static_cast<unsigned>(x.numel());
  start(reversals_kernel, dim3(1), dim3(n), n * sizeof(int), data<int>(x), data<int>(out));
}

// --- numbers --------------------------------------------------------------------------------

template <class T>
__global__ void numbers_kernel(const float* x, T* singles, uint32_t* pairs, float* back) {
  const int i = threadIdx.x;
  const Pair two = load_pair(x + 2 * i);
  singles[2 * i] = rounded<T>(two.first);
  singles[2 * i + 1] = rounded<T>(two.second);
  pairs[i] = pair(two.first, two.second, T());
  const Pair again = unpair(pairs[i], T());
  back[2 * i] = again.first;
  back[2 * i + 1] = to_float(singles[2 * i + 1]);
}

void numbers(const Tensor& x, const Tensor& singles, const Tensor& pairs, const Tensor& back) {
  const dim3 threads(static_cast<unsigned>(x.numel() / 2));
  if (singles.scalar_type() == ScalarType::Half) {
    start(numbers_kernel<half>, dim3(1), threads, 0, data<float>(x), data<half>(singles),
          data<uint32_t>(pairs), data<float>(back));
  } else {
    start(numbers_kernel<bfloat16>, dim3(1), threads, 0, data<float>(x), data<bfloat16>(singles),
          data<uint32_t>(pairs), data<float>(back));
  }
}

__global__ void clamp_kernel(const float* x, float* out) {
  const int i = threadIdx.x;
  const auto word = [](float v) { return __float_as_uint(v); };
  out[i] = __uint_as_float(clamp(word(x[i]), word(-1.0f), word(2.0f), float()));
}

void clamp_numbers(const Tensor& x, const Tensor& out) {
  start(clamp_kernel, dim3(1), dim3(static_cast<unsigned>(x.numel())), 0, data<float>(x),
        data<float>(out));
}

__global__ void round_kernel(const float* x, float* out) {
  const int i = threadIdx.x;
  out[i] = round_tf32(x[i]);
}

void round(const Tensor& x, const Tensor& out) {
  start(round_kernel, dim3(1), dim3(static_cast<unsigned>(x.numel())), 0, data<float>(x),
        data<float>(out));
}

// --- copies ---------------------------------------------------------------------------------

// Each thread's `steps` pieces of 16 bytes, every third one zeros, three groups under way at a
// time.
__global__ void copies_kernel(const Bytes16* x, Bytes16* out, int steps) {
  Bytes16* const shared = reinterpret_cast<Bytes16*>(shared_memory());
  const int n = blockDim.x, i = threadIdx.x;
  const auto load = [&](int step) {
    if (step < steps) cp_async_16(&shared[step % 4 * n + i], x + step * n + i, step % 3 != 2);
    cp_async_commit();
  };
  for (int step = 0; step < 3; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    load(step + 3);
    cp_async_wait<3>();
    out[step * n + i] = shared[step % 4 * n + i];
  }
  cp_async_wait<0>();
}

void copies(const Tensor& x, const Tensor& out, int64_t threads) {
  const auto steps = x.numel() * static_cast<int64_t>(x.element_size()) / (16 * threads);
  start(copies_kernel, dim3(1), dim3(static_cast<unsigned>(threads)),
        static_cast<size_t>(threads) * 64, data<Bytes16>(x), data<Bytes16>(out),
        static_cast<int>(steps));
}

// Tiles of 1 KiB through a ring of three slots: one thread copies, one warp hands on.
struct Ring {
  Mbarrier full[3], empty[3];
};

__global__ void ring_kernel(const unsigned char* x, unsigned char* out, int tiles, bool polls) {
  Ring* const ring = reinterpret_cast<Ring*>(shared_memory());
  unsigned char* const slots = shared_memory() + 128;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int i = 0; i < 3; ++i) {
      mbarrier_init(&ring->full[i], 1);
      mbarrier_init(&ring->empty[i], 32);
    }
    mbarrier_init_done();
  }
  sync_block();
  const auto wait = [&](Mbarrier* barrier, int parity) {
    if (polls) {
      while (!mbarrier_ready(barrier, parity)) {
      }
    } else {
      mbarrier_wait(barrier, parity);
    }
  };
  for (int tile = 0; tile < tiles; ++tile) {
    const int slot = tile % 3, parity = tile / 3 % 2;
    if (thread == 32) {
      wait(&ring->empty[slot], parity ^ 1);
      mbarrier_arrive_expect(&ring->full[slot], 1024);
      for (int part = 0; part < 2; ++part) {
        bulk_copy(slots + slot * 1024 + part * 512, x + tile * 1024 + part * 512, 512,
                  &ring->full[slot]);
      }
    } else if (thread < 32) {
      wait(&ring->full[slot], parity);
      for (int i = thread; i < 1024; i += 32) out[tile * 1024 + i] = slots[slot * 1024 + i];
      mbarrier_arrive(&ring->empty[slot]);
    }
  }
}

void ring(const Tensor& x, const Tensor& out, bool polls) {
  start(ring_kernel, dim3(1), dim3(33), 128 + 3 * 1024, data<unsigned char>(x),
        data<unsigned char>(out), static_cast<int>(x.numel() / 1024), polls);
}

// An mbarrier at which nobody arrives.
__global__ void poll_in_vain_kernel() {
  Mbarrier* const barrier = reinterpret_cast<Mbarrier*>(shared_memory());
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  sync_block();
  while (!mbarrier_ready(barrier, 0)) {
  }
}

void poll_in_vain() {
  start(poll_in_vain_kernel, dim3(1), dim3(64), sizeof(Mbarrier));
}

// --- registers ------------------------------------------------------------------------------

// Three warpgroups, of which the first gives what the others take: exactly as many, or too few.
template <int given, int taken>
__global__ void registers_kernel() {
  if (threadIdx.x < 128) {
    give_registers<given>();
  } else {
    take_registers<taken>();
  }
}

void share_registers(bool too_few) {
  start(too_few ? registers_kernel<80, 216> : registers_kernel<88, 208>, dim3(1), dim3(384), 0);
}

// --- matrices -------------------------------------------------------------------------------

// The four 8x8 matrices of x [32][8] as registers [lane][4].
__global__ void ldmatrix_kernel(const Bytes16* x, uint32_t* plain, uint32_t* transposed) {
  Bytes16* const shared = reinterpret_cast<Bytes16*>(shared_memory());
  const int lane = threadIdx.x;
  shared[lane] = load_once(x + lane);
  sync_warp();
  uint32_t registers[4];
  ldmatrix_x4(registers, shared + lane);
  for (int i = 0; i < 4; ++i) plain[4 * lane + i] = registers[i];
  ldmatrix_x4_trans(registers, shared + lane);
  for (int i = 0; i < 4; ++i) transposed[4 * lane + i] = registers[i];
}

void ldmatrix(const Tensor& x, const Tensor& plain, const Tensor& transposed) {
  start(ldmatrix_kernel, dim3(1), dim3(32), 512, data<Bytes16>(x), data<uint32_t>(plain),
        data<uint32_t>(transposed));
}

// d [16][8] += a [16][16] b [8][16]^T, each register from memory as the PTX ISA says.
// 16 numbers of 16 bits, or 8 of 32, are the sum's.
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  constexpr int in_word = 4 / sizeof(T), depth = 8 * in_word;
  const int lane = threadIdx.x, group = lane / 4, in_group = lane % 4;
  const auto word = [](const T* from) { return *reinterpret_cast<const uint32_t*>(from); };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    left[i] = word(a + (group + i % 2 * 8) * depth + i / 2 * (depth / 2) + in_group * in_word);
  }
  for (int i = 0; i < 2; ++i) {
    right[i] = word(b + group * depth + i * (depth / 2) + in_group * in_word);
  }
  const auto place = [&](int i) { return (group + i / 2 * 8) * 8 + in_group * 2 + i % 2; };
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[place(i)];
  if constexpr (sizeof(T) == 4) {
    mma_1688(sums, left, right);
  } else {
    mma_16816(sums, left, right, T());
  }
  for (int i = 0; i < 4; ++i) d[place(i)] = sums[i];
}

// d [64][columns] = a [64][k] b [columns][k]^T, one group of products under way while the next is
// issued; the operands go to shared memory as core matrices by ordinary stores.
template <class T, int columns>
__global__ void wgmma_kernel(const Bytes16* a, const Bytes16* b, float* d, int depth) {
  Bytes16* const left = reinterpret_cast<Bytes16*>(shared_memory());
  const int thread = threadIdx.x, planes = depth * static_cast<int>(sizeof(T)) / 16;
  Bytes16* const right = left + 64 * planes;
  for (int i = thread; i < 64 * planes; i += 128) left[i % planes * 64 + i / planes] = a[i];
  for (int i = thread; i < columns * planes; i += 128) {
    right[i % planes * columns + i / planes] = b[i];
  }
  fence_async();
  sync_block();
  take_registers<240>();
  float sums[columns / 2];
  wgmma_fence();
  for (int k = 0; k < planes; k += 2) {
    const uint64_t x = matrix_at(matrix(left, 64 * 16, 128), k * 64 * 16);
    const uint64_t w = matrix_at(matrix(right, columns * 16, 128), k * columns * 16);
    wgmma(sums, x, w, k > 0, T());
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_hold(sums);
  for (int i = 0; i < columns / 2; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    d[row * columns + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

template <class T>
void multiply_as(const Tensor& a, const Tensor& b, const Tensor& d) {
  if (a.size(0) == 16) {
    return start(mma_kernel<T>, dim3(1), dim3(32), 0, data<T>(a), data<T>(b), data<float>(d));
  }
  const auto run = [&](auto kernel) {
    const auto bytes = static_cast<size_t>((a.numel() + b.numel()) * sizeof(T));
    start(kernel, dim3(1), dim3(128), bytes, data<Bytes16>(a), data<Bytes16>(b), data<float>(d),
          static_cast<int>(a.size(1)));
  };
  if (b.size(0) == 64) return run(wgmma_kernel<T, 64>);
  if (b.size(0) == 128) return run(wgmma_kernel<T, 128>);
  throw std::runtime_error("no kernel for these columns");
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& d) {
  if (a.scalar_type() == ScalarType::Half) return multiply_as<half>(a, b, d);
  if (a.scalar_type() == ScalarType::Float) return multiply_as<float>(a, b, d);
  multiply_as<bfloat16>(a, b, d);
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY(cuda_on_cpu_test, m) {
  m.def("indices(Tensor(a!) out, int[] grid, int[] block) -> ()");
  m.def("mark(Tensor(a!) out, int pitch) -> ()");
  m.def("shuffles(Tensor x, Tensor(a!) rotated, Tensor(b!) swapped) -> ()");
  m.def("reversals(Tensor x, Tensor(a!) out) -> ()");
  m.def("numbers(Tensor x, Tensor(a!) singles, Tensor(b!) pairs, Tensor(c!) back) -> ()");
  m.def("clamp(Tensor x, Tensor(a!) out) -> ()");
  m.def("round(Tensor x, Tensor(a!) out) -> ()");
  m.def("copies(Tensor x, Tensor(a!) out, int threads) -> ()");
  m.def("ring(Tensor x, Tensor(a!) out, bool polls) -> ()");
  m.def("poll_in_vain() -> ()");
  m.def("registers(bool too_few) -> ()");
  m.def("ldmatrix(Tensor x, Tensor(a!) plain, Tensor(b!) transposed) -> ()");
  m.def("multiply(Tensor a, Tensor b, Tensor(a!) d) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu_test, CompositeExplicitAutograd, m) {
  m.impl("poll_in_vain", TORCH_BOX(&resnet_fused::cuda::poll_in_vain));
  m.impl("registers", TORCH_BOX(&resnet_fused::cuda::share_registers));
}
STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu_test, CPU, m) {
  m.impl("indices", TORCH_BOX(&resnet_fused::cuda::indices));
  m.impl("mark", TORCH_BOX(&resnet_fused::cuda::mark));
  m.impl("shuffles", TORCH_BOX(&resnet_fused::cuda::shuffles));
  m.impl("reversals", TORCH_BOX(&resnet_fused::cuda::reversals));
  m.impl("numbers", TORCH_BOX(&resnet_fused::cuda::numbers));
  m.impl("clamp", TORCH_BOX(&resnet_fused::cuda::clamp_numbers));
  m.impl("round", TORCH_BOX(&resnet_fused::cuda::round));
  m.impl("copies", TORCH_BOX(&resnet_fused::cuda::copies));
  m.impl("ring", TORCH_BOX(&resnet_fused::cuda::ring));
  m.impl("ldmatrix", TORCH_BOX(&resnet_fused::cuda::ldmatrix));
  m.impl("multiply", TORCH_BOX(&resnet_fused::cuda::multiply));
}
