// try_fault KERNEL FAULT ORDER: runs one of the kernels beside this file with a fault, or "none",
// and says on one line what came of it: "right", "wrong", or the checker's error. Then without the
// fault: that a block was left in the middle must not matter to the next.

#include <sys/mman.h>

#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "channel_statistics.cuh"
#include "conv_mma.cuh"
#include "conv_wgmma.cuh"
#include "pack_weights.cuh"
#include "runtime.h"

namespace resnet_fused::cuda::faults {
namespace {

template <class T>
std::vector<T> noise(size_t size, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> numbers(-1.0f, 1.0f);
  std::vector<T> values(size);
  for (T& value : values) value = rounded<T>(numbers(random));
  return values;
}

// Of results that are near 1, in roundings of the output.
bool near(double value, double expected, double roundings) {
  return std::abs(value - expected) <= roundings * (1.0 + std::abs(expected));
}

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// 3 pixels whose offsets pass 2^31 numbers, in memory of which all but three pages are nowhere.
bool sparse_statistics() {
  constexpr int kPixels = 3, kAll = 64;
  constexpr int64_t kPitch = int64_t{3} << 29;
  constexpr size_t kBytes = ((kPixels - 1) * kPitch + kAll) * sizeof(half);
  void* const memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no address space");
  half* const x = static_cast<half*>(memory);
  for (int p = 0; p < kPixels; ++p) {
    for (int c = 0; c < kAll; ++c) x[p * kPitch + c] = rounded<half>(static_cast<float>(p * c));
  }
  std::vector<float> sums(kAll), squares(kAll);
  check(run({x, sums.data(), squares.data(), kPixels, kAll, kPitch}));
  bool right = true;
  for (int c = 0; c < kAll; ++c) right = right && sums[c] == static_cast<float>(3 * c);
  munmap(memory, kBytes);
  return right;
}

bool statistics() {
  constexpr int kPixels = 75, kAll = 104;
  const std::vector<half> x = noise<half>(kPixels * kAll, 1);
  std::vector<float> sums(kAll, NAN), squares(kAll, NAN);
  check(run({x.data(), sums.data(), squares.data(), kPixels, kAll, kAll}));
  for (int c = 0; c < kAll; ++c) {
    double sum = 0, square = 0;
    for (int p = 0; p < kPixels; ++p) sum += to_float(x[p * kAll + c]);
    for (int p = 0; p < kPixels; ++p)
      square += std::pow(to_float(x[p * kAll + c]) - sum / kPixels, 2);
    if (!near(sums[c], sum, 1e-5) || !near(squares[c], square, 1e-5)) return false;
  }
  return true;
}

bool with_mma() {
  constexpr int kHeight = 11, kWidth = 13, kAll = 64;
  const auto x = noise<bfloat16>(kHeight * kWidth * kAll, 2);
  const auto w = noise<bfloat16>(kTaps * kOutputs * kAll, 3);
  std::vector<bfloat16> y(kHeight * kWidth * kOutputs, rounded<bfloat16>(NAN));
  check(run_mma({x.data(), w.data(), y.data(), kHeight, kWidth, kAll}));
  for (int i = 0; i < kHeight * kWidth * kOutputs; ++i) {
    const int out = i % kOutputs, column = i / kOutputs % kWidth, row = i / kOutputs / kWidth;
    double sum = 0;
    for (int tap = 0; tap < kTaps; ++tap) {
      const int r = row + tap / 3 - 1, c = column + tap % 3 - 1;
      if (r < 0 || r >= kHeight || c < 0 || c >= kWidth) continue;
      for (int k = 0; k < kAll; ++k) {
        sum += double{to_float(x[(r * kWidth + c) * kAll + k])} *
               to_float(w[(tap * kOutputs + out) * kAll + k]);
      }
    }
    if (!near(to_float(y[i]), sum, 1.0 / 256)) return false;
  }
  return true;
}

bool with_wgmma() {
  constexpr int kHeight = 8, kWidth = 16, kAll = 96;
  constexpr int kRow = kWidth + 2, kPlane = (kHeight + 2) * kRow;
  auto x = noise<half>(kAll * kPlane, 4);
  for (int i = 0; i < kAll * kPlane; ++i) {
    const int column = i / 8 % kRow, row = i / 8 / kRow % (kHeight + 2);
    if (column % (kRow - 1) == 0 || row % (kHeight + 1) == 0) x[i] = rounded<half>(0);
  }
  const auto w = noise<half>(kAll * 9 * kColumns, 5);
  std::vector<float> y(kHeight * kWidth * kColumns, NAN);
  check(run_wgmma({x.data(), w.data(), y.data(), kHeight, kWidth, kAll}));
  for (int i = 0; i < kHeight * kWidth * kColumns; ++i) {
    const int out = i % kColumns, column = i / kColumns % kWidth, row = i / kColumns / kWidth;
    double sum = 0;
    for (int k = 0; k < kAll; ++k) {
      for (int tap = 0; tap < 9; ++tap) {
        const int at = (k / 8 * kPlane + (row + tap / 3) * kRow + column + tap % 3) * 8 + k % 8;
        const int weight = ((k / 16 * 9 + tap) * 2 + k / 8 % 2) * kColumns * 8 + out * 8 + k % 8;
        sum += double{to_float(x[at])} * to_float(w[weight]);
      }
    }
    if (!near(y[i], sum, 1e-4)) return false;
  }
  return true;
}

bool packing() {
  constexpr int kAll = 40, kOwn = 12, kGroups = 2, kKernel = 9, kTileColumns = 64;
  const auto w = noise<bfloat16>(kAll * kOwn * kKernel, 6);
  std::vector<bfloat16> packed(kKernel * 64 * kTileColumns, rounded<bfloat16>(NAN));
  check(run_pack({w.data(), packed.data(), kAll, kOwn, kGroups, kKernel, kTileColumns}));
  std::vector<float> expected(packed.size());
  for (int i = 0; i < kAll * kOwn * kKernel; ++i) {
    const int tap = i % kKernel, output = i / kKernel / kOwn;
    const int channel = i / kKernel % kOwn + output / (kAll / kGroups) * kOwn;
    const int column = output / 32 * 32 + output / 2 % 4 * 8 + output / 8 % 4 * 2 + output % 2;
    const int line = (tap * 8 + channel / 8) * kTileColumns + column;
    expected[line * 8 + channel % 8] = to_float(w[i]);
  }
  for (size_t i = 0; i < packed.size(); ++i) {
    if (to_float(packed[i]) != expected[i]) return false;
  }
  return true;
}

}  // namespace
}  // namespace resnet_fused::cuda::faults

int main(int count, char** words) {
  using namespace resnet_fused::cuda;
  if (count != 4) return 2;
  const std::string kernel = words[1];
  const auto run = [&] {
    if (kernel == "statistics") return faults::statistics();
    if (kernel == "sparse_statistics") return faults::sparse_statistics();
    if (kernel == "conv_mma") return faults::with_mma();
    if (kernel == "conv_wgmma") return faults::with_wgmma();
    if (kernel == "pack_weights") return faults::packing();
    throw std::runtime_error("no kernel " + kernel);
  };
  try {
    on_cpu::set_order(words[3]);
    faults::which = words[2];
    std::puts(run() ? "right" : "wrong");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
  faults::which = "none";
  return run() ? 0 : 1;
}
