// wgmma: products of a warpgroup, from shared memory, that are done when they are waited for.
//
// Each of the 128 threads says what it wants; all must want the same. From then on its accumulators
// are NaN. The first thread that waits, once all have come so far, computes for the warpgroup, from
// what shared memory holds at that moment, which must still be what it was when the product was
// issued.
//
// The fragments and descriptors are those of the PTX ISA, "Asynchronous warpgroup level matrix
// instructions": K-major, no swizzle. Sums as in matrix.cpp.

#include <algorithm>
#include <cmath>

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

constexpr int kRows = 64, kMostDepth = 16, kMostColumns = 128;
constexpr uint32_t kCoreBytes = 128;  // 8 rows of 16 bytes

struct Product {
  uint64_t a, b;
  int size;  // of a thread's accumulator
  bool adds;
  Operand operand;
  Site site;
  std::vector<unsigned char> operands;  // as they were when it was issued
};

struct Warpgroup {
  std::vector<Product> products;  // that are not done
  size_t done = 0;                // before those
  std::vector<size_t> groups;     // where each ends, counting from the first product of all
  std::vector<int> committed;     // threads that have, of each group
  std::vector<Thread*> waiting;
};

Warpgroup warpgroups[kMostThreads / kWarpgroup];

uint32_t field(uint64_t descriptor, int shift) {
  return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4;
}

// Where the operand's core matrices lie, each pair along k first.
template <class Visit>
void for_each_core(uint64_t descriptor, int rows, Visit visit) {
  const uint32_t start = field(descriptor, 0), along_k = field(descriptor, 16);
  const uint32_t along_rows = field(descriptor, 32);
  for (int r = 0; r < rows / 8; ++r) {
    for (uint32_t k = 0; k < 2; ++k) {
      visit(start + static_cast<uint32_t>(r) * along_rows + k * along_k, 8 * r);
    }
  }
}

template <class Visit>
void for_each_core(const Product& product, Visit visit) {
  for_each_core(product.a, kRows, [&](uint32_t address, int row) { visit(address, row, "a"); });
  for_each_core(product.b, 2 * product.size,
                [&](uint32_t address, int row) { visit(address, row, "b"); });
}

// Tells the watcher of each piece of shared memory that the product reads.
template <class Tell>
void watch_operands(const Product& product, Tell tell) {
  if constexpr (watch::kOn) {
    for_each_core(product, [&](uint32_t address, int, const char*) {
      tell(address - kSharedBase, kCoreBytes);
    });
  }
}

// Both operands, core matrix after core matrix.
void gather(const Product& product, std::vector<unsigned char>& to) {
  for_each_core(product, [&](uint32_t address, int row, const char* operand) {
    if (address < kSharedBase || address - kSharedBase + kCoreBytes > shared_bytes) {
      fail(product.site, "wgmma: rows ", row, " to ", row + 7, " of operand ", operand,
           " are outside of shared memory: byte ",
           static_cast<int64_t>(address) - int64_t{kSharedBase}, " of ", shared_bytes);
    }
    const uint32_t offset = address - kSharedBase;
    for (uint32_t i = 0; i < kCoreBytes; i += kGranule) {
      const Granule state = granules[(offset + i) / kGranule];
      if (state == Granule::settled) continue;
      fail(product.site, "wgmma: byte ", offset + i, " of shared memory, row ", row + i / 16,
           " of operand ", operand,
           state == Granule::in_flight
               ? ", is the destination of a copy that was not waited for"
               : ", was written by a cp_async_16 that no fence_async of that thread followed");
    }
    const unsigned char* const from = shared_memory() + offset;
    to.insert(to.end(), from, from + kCoreBytes);
  });
}

Warpgroup& own_warpgroup(const char* name, Site site) {
  const int which = block.running->number / kWarpgroup;
  if ((which + 1) * kWarpgroup > block.size) {
    fail(site, name, ": the warpgroup has only ", block.size - which * kWarpgroup, " threads");
  }
  return warpgroups[which];
}

Accumulator* accumulator_of(Thread& thread, const float* registers) {
  for (Accumulator& it : thread.products.accumulators) {
    if (it.registers == registers) return &it;
  }
  return nullptr;
}

// Registers that a product writes: what they hold goes to where the product will find it.
void take_registers_away(Thread& self, float* d, const Product& product) {
  Accumulator* it = accumulator_of(self, d);
  if (it != nullptr && it->pending > 0) {
    if (it->size != product.size) {
      fail(product.site, "wgmma: the accumulators of a product of another shape are under way");
    }
    ++it->pending;
    return;
  }
  const size_t bytes = sizeof(float) * static_cast<size_t>(product.size);
  const bool same = it != nullptr && it->size == product.size && product.adds &&
                    std::memcmp(it->values, d, bytes) == 0;
  if (!self.products.fenced && !same) {
    fail(product.site, "wgmma: no wgmma_fence since the accumulators were last used otherwise");
  }
  if (it == nullptr) it = &self.products.accumulators.emplace_back();
  it->registers = d;
  it->size = product.size;
  it->pending = 1;
  std::memcpy(it->values, d, bytes);
  std::fill(d, d + product.size, std::nanf(""));
}

// The rows of a thread's accumulator, and its columns.
int row_of(int thread, int i) {
  return thread / kWarp * 16 + thread % kWarp / 4 + i % 4 / 2 * 8;
}
int column_of(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

void compute(const Product& product, const std::vector<Accumulator*>& accumulators) {
  static float left[kRows][kMostDepth], right[kMostDepth][kMostColumns], sums[kRows][kMostColumns];
  const int columns = 2 * product.size;
  const unsigned char* from = product.operands.data();
  const bool wide = product.operand == Operand::tf32;
  const int across = wide ? 4 : 8;  // numbers of a core matrix's row
  const auto number = [&] {
    uint32_t bits = 0;
    std::memcpy(&bits, from, wide ? 4 : 2);
    from += wide ? 4 : 2;
    if (wide) return tf32_of(bits);
    return float_of(static_cast<uint16_t>(bits), product.operand == Operand::bfloat16);
  };
  const auto read = [&](int rows, auto put) {
    for (int core = 0; core < rows / 8 * 2; ++core) {
      for (int i = 0; i < 8 * across; ++i) {
        put(core / 2 * 8 + i / across, core % 2 * across + i % across, number());
      }
    }
  };
  read(kRows, [](int row, int k, float value) { left[row][k] = value; });
  read(columns, [](int column, int k, float value) { right[k][column] = value; });
  for (int t = 0; t < kWarpgroup; ++t) {
    const float* const values = accumulators[t]->values;
    for (int i = 0; i < product.size; ++i) {
      sums[row_of(t, i)][column_of(t, i)] = product.adds ? values[i] : 0.0f;
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < 2 * across; ++k) {
      const float factor = left[row][k];
      for (int c = 0; c < columns; ++c) sums[row][c] += factor * right[k][c];
    }
  }
  for (int t = 0; t < kWarpgroup; ++t) {
    float* const values = accumulators[t]->values;
    for (int i = 0; i < product.size; ++i) values[i] = sums[row_of(t, i)][column_of(t, i)];
  }
}

// Does all products before `end`.
void complete(Warpgroup& warpgroup, size_t end) {
  const int first = block.running->number / kWarpgroup * kWarpgroup;
  const size_t count = end - warpgroup.done;
  for (size_t i = 0; i < count; ++i) {
    const Product& product = warpgroup.products[i];
    std::vector<unsigned char> now;
    gather(product, now);
    if (now != product.operands) {
      fail(product.site, "wgmma: its operands were overwritten before the wgmma_wait");
    }
    std::vector<Accumulator*> accumulators(kWarpgroup);
    for (int t = 0; t < kWarpgroup; ++t) {
      Thread& thread = *block.threads[first + t];
      accumulators[t] = accumulator_of(thread, thread.products.registers[i]);
    }
    compute(product, accumulators);
    watch_operands(product, watch::product_done);
    for (Accumulator* it : accumulators) {
      if (--it->pending > 0) continue;
      std::memcpy(it->registers, it->values, sizeof(float) * static_cast<size_t>(it->size));
    }
  }
  const auto n = static_cast<std::ptrdiff_t>(count);
  for (int t = 0; t < kWarpgroup; ++t) {
    auto& registers = block.threads[first + t]->products.registers;
    registers.erase(registers.begin(), registers.begin() + n);
  }
  warpgroup.products.erase(warpgroup.products.begin(), warpgroup.products.begin() + n);
  warpgroup.done = end;
  watch::group_done();
  for (const Product& product : warpgroup.products) {  // some may read the same
    watch_operands(product, [&](uint32_t offset, uint32_t bytes) {
      watch::product_started(offset, bytes, product.site);
    });
  }
}

}  // namespace

void prepare_products() {
  for (Warpgroup& warpgroup : warpgroups) warpgroup = Warpgroup();
}

void start_products(Thread& thread) {
  thread.products = Products();
}

void finish_products(Thread& thread) {
  const Products& products = thread.products;
  const Warpgroup& warpgroup = warpgroups[thread.number / kWarpgroup];
  const size_t grouped = products.committed == 0 ? 0 : warpgroup.groups[products.committed - 1];
  if (products.waited < products.committed || grouped < products.issued) {
    const Site site = warpgroup.products.empty() ? thread.site : warpgroup.products.front().site;
    fail(site, "finishes without waiting for a wgmma");
  }
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

uint64_t matrix(const void* start, int along_k, int along_rows, Site site) {
  if (along_k % 16 != 0 || along_rows % 16 != 0 || along_k < 0 || along_rows < 0 ||
      along_k >= 1 << 18 || along_rows >= 1 << 18) {
    fail(site, "matrix: ", along_k, " and ", along_rows, " must be multiples of 16 below 2^18");
  }
  check_shared(start, 0, 16, "matrix", site);
  const auto encoded = [](uint32_t bytes) { return static_cast<uint64_t>(bytes >> 4); };
  return encoded(shared_address(start, site)) | encoded(static_cast<uint32_t>(along_k)) << 16 |
         encoded(static_cast<uint32_t>(along_rows)) << 32;
}

uint64_t matrix_at(uint64_t matrix, int bytes, Site site) {
  if (bytes % 16 != 0) fail(site, "matrix_at: ", bytes, " bytes is not a multiple of 16");
  const int64_t start = static_cast<int64_t>(field(matrix, 0)) + bytes;
  if (start < 0 || start >= 1 << 18) fail(site, "matrix_at: ", bytes, " bytes leave the field");
  return matrix + static_cast<uint64_t>(static_cast<int64_t>(bytes >> 4));
}

void wgmma_fence(Site site) {
  own_warpgroup("wgmma_fence", site);
  block.running->products.fenced = true;
}

void wgmma_of(float* d, int n, uint64_t a, uint64_t b, bool adds, Operand operand, Site site) {
  Warpgroup& warpgroup = own_warpgroup("wgmma", site);
  Thread& self = *block.running;
  const size_t which = self.products.issued++ - warpgroup.done;
  if (which == warpgroup.products.size()) {
    Product product{a, b, n, adds, operand, site, {}};
    gather(product, product.operands);
    watch_operands(product, [&](uint32_t offset, uint32_t bytes) {
      watch::product_started(offset, bytes, site);
    });
    warpgroup.products.push_back(std::move(product));
  }
  const Product& product = warpgroup.products[which];
  if (product.a != a || product.b != b || product.size != n || product.adds != adds ||
      product.operand != operand || product.site.line != site.line) {
    fail(site, "wgmma: another thread of the warpgroup issued another product (",
         place(product.site), ")");
  }
  if (self.number % kWarp == 0) {  // one of each warp is enough
    watch_operands(product, [&](uint32_t offset, uint32_t bytes) {
      watch::product_checked(offset, bytes, site);
    });
  }
  take_registers_away(self, d, product);
  self.products.registers.push_back(d);
}

void wgmma_commit(Site site) {
  Warpgroup& warpgroup = own_warpgroup("wgmma_commit", site);
  Products& own = block.running->products;
  const size_t which = own.committed++;
  if (which == warpgroup.groups.size()) {
    warpgroup.groups.push_back(own.issued);
    warpgroup.committed.push_back(0);
  }
  if (warpgroup.groups[which] != own.issued) {
    fail(site, "wgmma_commit: another thread of the warpgroup has ended the group elsewhere");
  }
  if (++warpgroup.committed[which] == kWarpgroup) {
    for (Thread* thread : warpgroup.waiting) wake(*thread);
    warpgroup.waiting.clear();
  }
  let_others_run(false);
}

void wgmma_wait_for(int younger, Site site) {
  Warpgroup& warpgroup = own_warpgroup("wgmma_wait", site);
  Products& own = block.running->products;
  let_others_run(false);
  if (own.committed <= static_cast<size_t>(younger)) return;
  const size_t groups = own.committed - static_cast<size_t>(younger);
  while (warpgroup.committed[groups - 1] < kWarpgroup) {
    warpgroup.waiting.push_back(block.running);
    wait_for("the warpgroup's other threads at wgmma_wait", site);
  }
  const size_t end = warpgroup.groups[groups - 1];
  if (end > warpgroup.done) complete(warpgroup, end);
  own.waited = std::max(own.waited, groups);
  own.fenced = false;
  watch::group_waited();
}

}  // namespace resnet_fused::cuda
