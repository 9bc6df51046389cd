// mma.sync and ldmatrix: a warp meets, and the last lane to come computes for all.
//
// The fragments are those of the PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix".
// Products are exact and added in float32, one k after another; the chip rounds otherwise.

#include <vector>

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

std::vector<float> all_halves() {
  std::vector<float> values(65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    const __half_raw raw{static_cast<unsigned short>(i)};
    values[i] = __half2float(half(raw));
  }
  return values;
}

// What each lane of the warp hands in.
struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
struct Rows {
  uint32_t* to;
  const unsigned char* row;
};
Fragments fragments[kMostThreads];
Rows rows[kMostThreads];

int first_of_warp() {
  return block.running->number / kWarp * kWarp;
}

void whole_warp(const char* name, Site site) {
  if (warp_size() != kWarp) fail(site, name, " in a warp of ", warp_size(), " threads");
}

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, const char* name,
                   Site site) {
  whole_warp(name, site);
  check_shared(row, 16, 16, name, site);
  if (granules[shared_offset(row) / kGranule] == Granule::in_flight) {
    fail(site, name, ": byte ", shared_offset(row),
         " of shared memory is the destination of a copy that was not waited for");
  }
  watch::read_by_ldmatrix(shared_offset(row), 16, site);
  rows[block.running->number] = {to, static_cast<const unsigned char*>(row)};
  Meeting& warp = own_warp();
  if (!join(warp, name, site, kWarp, true)) return;
  const Rows* const lanes = rows + first_of_warp();
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int m = 0; m < 4; ++m) {
      uint16_t both[2];
      for (int i = 0; i < 2; ++i) {
        const int across = lane / 4, along = lane % 4 * 2 + i;
        const int r = transposed ? along : across, c = transposed ? across : along;
        std::memcpy(&both[i], lanes[8 * m + r].row + 2 * c, 2);
      }
      std::memcpy(&lanes[lane].to[m], both, 4);
    }
  }
  leave(warp);
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operand operand,
              const char* name, Site site) {
  whole_warp(name, site);
  fragments[block.running->number] = {d, a, b};
  Meeting& warp = own_warp();
  if (!join(warp, name, site, kWarp, true)) return;
  const Fragments* const lanes = fragments + first_of_warp();
  const int in_word = operand == Operand::tf32 ? 1 : 2, half_depth = 4 * in_word;
  float left[16][16], right[16][8];  // [m][k], [k][n]
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, k = lane % 4 * in_word;
    for (int i = 0; i < in_word; ++i) {
      const auto number = [&](uint32_t word) {
        if (operand == Operand::tf32) return tf32_of(word);
        return float_of(static_cast<uint16_t>(word >> (16 * i)), operand == Operand::bfloat16);
      };
      for (int r = 0; r < 4; ++r) {
        left[group + r % 2 * 8][k + r / 2 * half_depth + i] = number(lanes[lane].a[r]);
      }
      for (int r = 0; r < 2; ++r) right[k + r * half_depth + i][group] = number(lanes[lane].b[r]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    float sums[8];
    for (int n = 0; n < 8; ++n) sums[n] = lanes[m % 8 * 4 + n / 2].d[m / 8 * 2 + n % 2];
    for (int k = 0; k < 2 * half_depth; ++k) {
      for (int n = 0; n < 8; ++n) sums[n] += left[m][k] * right[k][n];
    }
    for (int n = 0; n < 8; ++n) lanes[m % 8 * 4 + n / 2].d[m / 8 * 2 + n % 2] = sums[n];
  }
  leave(warp);
}

}  // namespace

float float_of(uint16_t bits, bool is_bfloat16) {
  static const std::vector<float> halves = all_halves();
  if (!is_bfloat16) return halves[bits];
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

float tf32_of(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

void ldmatrix_x4(uint32_t (&to)[4], const void* row, Site site) {
  on_cpu::load_matrices(to, row, false, "ldmatrix_x4", site);
}

void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row, Site site) {
  on_cpu::load_matrices(to, row, true, "ldmatrix_x4_trans", site);
}

void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half, Site site) {
  on_cpu::multiply(d, a, b, Operand::float16, "mma_16816 (float16)", site);
}

void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16, Site site) {
  on_cpu::multiply(d, a, b, Operand::bfloat16, "mma_16816 (bfloat16)", site);
}

void mma_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  on_cpu::multiply(d, a, b, Operand::tf32, "mma_1688", site);
}

}  // namespace resnet_fused::cuda
