// What the instructions of hardware_on_cpu.h share: the block that runs, its threads, how they wait
// for each other, and its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "fiber.h"
#include "hardware_on_cpu.h"

namespace resnet_fused::cuda::on_cpu {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kMostThreads = 1024;
constexpr int kMultiprocessors = 3;

// An asynchronous copy that has been asked for.
struct Copy {
  unsigned char* to;
  const unsigned char* from;  // nullptr: zeros
  uint32_t bytes;
  Site site;
};

// A thread's asynchronous copies by cp.async.
struct CopyGroups {
  std::vector<Copy> copies;
  std::vector<size_t> ends;  // of the groups, in `copies`
  size_t done_copies = 0, done_groups = 0;
};

// A thread's accumulator under products that are not done.
struct Accumulator {
  float* registers;
  int size;
  int pending;  // products
  float values[128];
};

// A thread's part of its warpgroup's products.
struct Products {
  std::vector<float*> registers;  // of each product since the warpgroup's first that is not done
  std::vector<Accumulator> accumulators;
  size_t issued = 0, committed = 0, waited = 0;
  bool fenced = false;
};

struct Thread {
  Fiber fiber;
  int number = 0, rank = 0;
  uint3 index{};
  bool finished = false;
  const char* waits = nullptr;  // for what
  Site site{};
  const Mbarrier* barrier = nullptr;  // if it waits for one,
  int parity = 0;                     // for the end of this phase
  int registers = 0;
  CopyGroups copies;
  std::vector<uint32_t> unfenced;  // granules written by copies that fence_async has not followed
  Products products;
};

// Threads that wait until so many have come.
struct Meeting {
  const char* name = nullptr;
  Site site{};
  int expected = 0;
  std::vector<Thread*> here;
};

// Marsaglia, "Xorshift RNGs" (2003). Not <random>: where kernels use that too, the linker may take
// their copy of its functions, whose accesses are watched.
struct Random {
  uint32_t state = 1;

  void seed(uint64_t value) {
    state = static_cast<uint32_t>((value * 0x9e3779b97f4a7c15u) >> 32) | 1;
  }
  uint32_t below(uint32_t limit) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state % limit;
  }
};

struct Block {
  int size = 0, warps = 0, alive = 0;
  std::vector<Thread*> threads;
  Thread* running = nullptr;
  Fiber* caller = nullptr;  // whoever launched
  std::string error;
  void (*entry)(const void*) = nullptr;
  const void* kernel = nullptr;
  Meeting all, named[16], warp[kMostThreads / kWarp];
  Random random;
};

extern Block block;

// --- scheduling (schedule.cpp) --------------------------------------------------------------

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;
  uint32_t seed = 0;
  int64_t first_block = 0, last_block = -1;  // the blocks that run; all if last is negative
  // Few, so that those blocks that take one tile after another take several.
  int multiprocessors = kMultiprocessors;
};

extern Settings settings;

void set_order(const std::string& text);
void run_block();  // that of blockIdx

std::string place(Site site);
std::string numbers(const uint3& at);
std::string block_name();
std::string thread_name(const Thread& thread);

// Ends the launch with an error; of the running thread.
[[noreturn]] void stop(const std::string& error);

template <class... Parts>
[[noreturn]] void fail(Site site, const Parts&... parts) {
  std::ostringstream text;
  text << thread_name(*block.running) << ": ";
  ((text << parts), ...);
  text << " (" << place(site) << ")";
  stop(text.str());
}

// The running thread goes on when wake() has been called for it.
void wait_for(const char* what, Site site);
void wake(Thread& thread);
// Others may run first: in a random order sometimes, by `now` until none of them can go on.
void let_others_run(bool now);
bool one_in(int times);  // at random, in a random order; else never

// The running thread joins; true in the last to come, which calls leave() when it has done what
// there is to do. The others return once it has.
bool join(Meeting& meeting, const char* name, Site site, int expected, bool same_site);
void leave(Meeting& meeting);

inline Meeting& own_warp() {
  return block.warp[block.running->number / kWarp];
}
inline int warp_size() {
  const int first = block.running->number / kWarp * kWarp;
  return block.size - first < kWarp ? block.size - first : kWarp;
}

// --- shared memory (shared_memory.cpp) ------------------------------------------------------

constexpr size_t kMostShared = 227 * 1024;
constexpr uint32_t kGranule = 16;
// Where shared memory starts in its own address space: the first KiB belongs to the system there.
constexpr uint32_t kSharedBase = 1024;

enum class Granule : uint8_t { settled, in_flight, unfenced };

extern size_t shared_bytes;
extern Granule granules[kMostShared / kGranule];

void prepare_shared(size_t bytes);
void check_red_zones();
void check_shared(const void* pointer, uint32_t bytes, uint32_t alignment, const char* name,
                  Site site);
uint32_t shared_offset(const void* pointer);
// A copy under way: what it will write is NaN and must not be touched, until it has arrived.
void take_away(const Copy& copy);
void arrive(const Copy& copy, Granule then);
void check_source(const Copy& copy, const char* name);

// --- asynchronous copies (async_copy.cpp, mbarrier.cpp), products (wgmma.cpp) -----------------

void start_copies(Thread& thread);
void finish_copies(Thread& thread);
void prepare_barriers();
void finish_barriers();
bool copies_under_way();
void deliver_one();
std::string state_of(const Mbarrier& barrier, int parity);
void prepare_registers();  // registers.cpp
void prepare_products();
void start_products(Thread& thread);
void finish_products(Thread& thread);

// --- numbers (matrix.cpp) -------------------------------------------------------------------

float float_of(uint16_t bits, bool is_bfloat16);
float tf32_of(uint32_t bits);  // as products read a float32

}  // namespace resnet_fused::cuda::on_cpu
