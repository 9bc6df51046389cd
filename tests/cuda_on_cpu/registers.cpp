// setmaxnreg: a block's registers are a pool, from which a warp takes and to which it gives.
//
// The block has what it was launched with: as many a thread as there are for all, in eights, in a
// kernel of one block a multiprocessor. Who wants more waits until others have given as many.

#include <algorithm>
#include <vector>

#include "runtime.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

constexpr int kOfMultiprocessor = 65536, kMostOfThread = 255;

int left = 0;  // in the pool
std::vector<Thread*> waiting;

}  // namespace

void prepare_registers() {
  const int each = std::min(kOfMultiprocessor / block.size / 8 * 8, kMostOfThread);
  for (int i = 0; i < block.size; ++i) block.threads[i]->registers = each;
  left = 0;
  waiting.clear();
}

}  // namespace resnet_fused::cuda::on_cpu

namespace resnet_fused::cuda {

using namespace on_cpu;

void take_registers_of(int registers, Site site) {
  Thread& self = *block.running;
  while (left < registers - self.registers) {
    waiting.push_back(&self);
    wait_for("registers of others at take_registers", site);
  }
  if (registers <= self.registers) return;
  left -= registers - self.registers;
  self.registers = registers;
}

void give_registers_of(int registers, Site site) {
  Thread& self = *block.running;
  if (registers > self.registers) {
    fail(site, "give_registers: ", registers, " are more than the thread has, ", self.registers);
  }
  left += self.registers - registers;
  self.registers = registers;
  for (Thread* thread : waiting) wake(*thread);
  waiting.clear();
}

}  // namespace resnet_fused::cuda
