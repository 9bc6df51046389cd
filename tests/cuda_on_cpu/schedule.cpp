// Which thread of a block runs next, how threads wait for each other, and what is said when they
// cannot go on.
//
// The ready thread of the highest rank runs until it has to wait. Strict ranks, and not turns, make
// warps run far apart, which is what shows a missing barrier. A random order gives warps random
// ranks and other ones now and then. Asynchronous copies arrive as late as they can, or at random.

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>

#include "watch.h"

namespace resnet_fused::cuda::on_cpu {

Block block;

namespace {

constexpr int kWords = kMostThreads / 64;
constexpr int kMostVainRounds = 10000;  // in which threads only look what others have done

// Threads by rank.
struct Ranks {
  uint64_t words[kWords] = {};

  void add(int rank) { words[rank / 64] |= uint64_t{1} << (rank % 64); }
  int take() {  // the first, or -1
    for (int i = 0; i < kWords; ++i) {
      if (words[i] == 0) continue;
      const int bit = __builtin_ctzll(words[i]);
      words[i] &= words[i] - 1;
      return i * 64 + bit;
    }
    return -1;
  }
};

Ranks ready, looking;  // `looking`: may run when no other can
Thread* by_rank[kMostThreads];
int vain_rounds;

void rank_threads() {
  std::vector<int> warps(block.warps);
  std::iota(warps.begin(), warps.end(), 0);
  bool backwards = settings.order == Order::reverse;
  if (settings.order == Order::random) {
    for (size_t i = warps.size(); i > 1; --i) {
      std::swap(warps[i - 1], warps[block.random.below(static_cast<uint32_t>(i))]);
    }
    backwards = block.random.below(2) != 0;
  } else if (backwards) {
    std::reverse(warps.begin(), warps.end());
  }
  int rank = 0;
  for (const int warp : warps) {
    const int first = warp * kWarp, end = std::min(first + kWarp, block.size);
    for (int i = first; i < end; ++i) {
      Thread& thread = *block.threads[backwards ? first + end - 1 - i : i];
      thread.rank = rank;
      by_rank[rank++] = &thread;
    }
  }
}

void rank_again() {
  std::vector<Thread*> were_ready, were_looking;
  for (int rank; (rank = ready.take()) >= 0;) were_ready.push_back(by_rank[rank]);
  for (int rank; (rank = looking.take()) >= 0;) were_looking.push_back(by_rank[rank]);
  rank_threads();
  for (const Thread* thread : were_ready) ready.add(thread->rank);
  for (const Thread* thread : were_looking) looking.add(thread->rank);
}

// Where all threads are that have not finished.
std::string deadlock() {
  std::map<std::string, std::pair<const Thread*, int>> places;
  int finished = 0;
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.finished) {
      ++finished;
      continue;
    }
    std::string what = thread.waits == nullptr ? "others" : thread.waits;
    if (thread.barrier != nullptr) what += " " + state_of(*thread.barrier, thread.parity);
    auto& [first, count] = places[what + " (" + place(thread.site) + ")"];
    if (count++ == 0) first = &thread;
  }
  std::ostringstream text;
  text << block_name() << ": deadlock: ";
  for (const auto& [what, threads] : places) {
    text << threads.second << " threads, the first " << numbers(threads.first->index)
         << ", wait for " << what << "; ";
  }
  text << finished << " threads have finished";
  return text.str();
}

// The next to run, or nullptr: all have finished, or an error ends the block.
Thread* next() {
  if (one_in(8) && copies_under_way()) deliver_one();
  for (;;) {
    if (!block.error.empty()) return nullptr;
    int rank = ready.take();
    if (rank >= 0) return by_rank[rank];
    if (block.alive == 0) return nullptr;
    const bool delivers = copies_under_way();
    if (delivers) deliver_one();
    rank = looking.take();
    if (rank >= 0 && vain_rounds < kMostVainRounds) {
      ready.add(rank);
      while ((rank = looking.take()) >= 0) ready.add(rank);
      rank = ready.take();
      ++vain_rounds;
      return by_rank[rank];
    }
    if (!delivers) {
      block.error = deadlock();
      return nullptr;
    }
  }
}

// Runs whoever is next; the running thread has said what it waits for.
void go_on() {
  Thread& self = *block.running;
  Thread* const other = next();
  if (other == &self) return;
  block.running = other;
  if (other == nullptr) {
    Fiber::go(self.fiber, *block.caller);
  } else {
    threadIdx = other->index;
    Fiber::go(self.fiber, other->fiber);
  }
}

[[noreturn]] void fiber_entry() {
  Thread& self = *block.running;
  Fiber::arrived(self.fiber);
  block.entry(block.kernel);
  finish_copies(self);
  finish_products(self);
  self.finished = true;
  --block.alive;
  vain_rounds = 0;
  go_on();
  __builtin_unreachable();
}

}  // namespace

bool one_in(int times) {
  return settings.order == Order::random && block.random.below(static_cast<uint32_t>(times)) == 0;
}

void run_block() {
  prepare_shared(shared_bytes);
  prepare_barriers();
  prepare_products();
  prepare_registers();
  watch::start_block();
  for (Meeting& meeting : block.named) meeting.here.clear();
  for (Meeting& meeting : block.warp) meeting.here.clear();
  block.all.here.clear();
  ready = looking = Ranks();
  vain_rounds = 0;
  rank_threads();
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = *block.threads[i];
    thread.fiber.start(fiber_entry, !thread.finished);
    thread.finished = false;
    thread.waits = nullptr;
    thread.barrier = nullptr;
    start_copies(thread);
    start_products(thread);
    ready.add(thread.rank);
  }
  block.alive = block.size;
  Thread* const first = by_rank[ready.take()];
  block.running = first;
  threadIdx = first->index;
  Fiber::go(*block.caller, first->fiber);
  block.running = nullptr;
  if (block.error.empty()) finish_barriers();
  if (block.error.empty()) check_red_zones();
  if (!block.error.empty()) {
    throw std::runtime_error("cuda_on_cpu: " + std::exchange(block.error, std::string()));
  }
}

void stop(const std::string& error) {
  Thread& self = *block.running;
  block.error = error;
  block.running = nullptr;
  Fiber::go(self.fiber, *block.caller);
  __builtin_unreachable();
}

void wait_for(const char* what, Site site) {
  block.running->waits = what;
  block.running->site = site;
  go_on();
}

void wake(Thread& thread) {
  vain_rounds = 0;
  ready.add(thread.rank);
}

void let_others_run(bool now) {
  Thread& self = *block.running;
  if (now) {
    looking.add(self.rank);
  } else if (one_in(32)) {
    rank_again();
    ready.add(self.rank);
  } else {
    return;
  }
  self.waits = nullptr;
  go_on();
}

}  // namespace resnet_fused::cuda::on_cpu
