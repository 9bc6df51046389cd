// Runs a grid, block after block, in the order that was asked for.

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "watch.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace resnet_fused::cuda::on_cpu {

Settings settings;

void set_order(const std::string& text) {
  if (text == "forward" || text == "reverse") {
    settings.order = text == "forward" ? Order::forward : Order::reverse;
    return;
  }
  const std::string prefix = "random:";
  const std::string seed =
      text.substr(0, prefix.size()) == prefix ? text.substr(prefix.size()) : "";
  if (seed.empty() || seed.find_first_not_of("0123456789") != std::string::npos) {
    throw std::runtime_error("order must be forward, reverse or random:SEED, got '" + text + "'");
  }
  settings.order = Order::random;
  settings.seed = static_cast<uint32_t>(std::stoull(seed));
}

namespace {

void make_threads(const dim3& size) {
  block.size = static_cast<int>(size.x * size.y * size.z);
  block.warps = (block.size + kWarp - 1) / kWarp;
  for (int i = 0; i < block.size; ++i) {
    if (i == static_cast<int>(block.threads.size())) {
      block.threads.push_back(new Thread());
      block.threads[i]->finished = true;
    }
    const uint32_t n = static_cast<uint32_t>(i);
    block.threads[i]->number = i;
    block.threads[i]->index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
  }
}

}  // namespace
}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

int multiprocessors() {
  return settings.multiprocessors;
}

const char* launch_on_cpu(dim3 grid, dim3 size, size_t bytes, void (*thread)(const void* kernel),
                          const void* kernel) {
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 ||
      grid.z > 65535 || threads == 0 || threads > kMostThreads || size.z > 64) {
    return "invalid configuration argument";
  }
  if (bytes > kMostShared) return "invalid argument";
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  Fiber caller;
  block.caller = &caller;
  block.entry = thread;
  block.kernel = kernel;
  make_threads(size);
  gridDim = grid;
  blockDim = size;
  shared_bytes = bytes;
  watch::start_grid();
  const int64_t all = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int64_t first = std::min(settings.first_block, all);
  const int64_t last = settings.last_block < 0 ? all : std::min(settings.last_block, all);
  for (int64_t i = first; i < last; ++i) {
    const int64_t n = settings.order == Order::reverse ? first + last - 1 - i : i;
    blockIdx = {static_cast<uint32_t>(n % grid.x), static_cast<uint32_t>(n / grid.x % grid.y),
                static_cast<uint32_t>(n / grid.x / grid.y)};
    block.random.seed(settings.seed * uint64_t{1000003} + static_cast<uint64_t>(n) + 1);
    run_block();
  }
  return nullptr;
}

}  // namespace resnet_fused::cuda
