// How threads and lines of the code are called in messages.

#include <dlfcn.h>

#include <cstdio>

#include "runtime.h"

namespace resnet_fused::cuda::on_cpu {
namespace {

// The lines of an address in the code, the innermost function first.
std::string place_of(const char* code) {
  Dl_info object;
  if (dladdr(code, &object) == 0) return "?";
  const auto* const base = static_cast<const char*>(object.dli_fbase);
  std::ostringstream command;
  command << "addr2line -i -e '" << object.dli_fname << "' 0x" << std::hex << (code - 1 - base)
          << " 2>/dev/null";
  FILE* const lines = popen(command.str().c_str(), "r");
  std::string text;
  char line[4096];
  for (int i = 0; i < 4 && lines != nullptr && fgets(line, sizeof(line), lines) != nullptr; ++i) {
    const std::string where = line;
    const size_t name = where.rfind('/') + 1;
    text += (i > 0 ? " in " : "") + where.substr(name, where.find_first_of(" \n", name) - name);
  }
  if (lines != nullptr) pclose(lines);
  return text;
}

}  // namespace

std::string numbers(const uint3& at) {
  std::ostringstream text;
  text << "(" << at.x << ", " << at.y << ", " << at.z << ")";
  return text.str();
}

std::string place(Site site) {
  if (site.line < 0) return place_of(site.file);
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string block_name() {
  return "block " + numbers(blockIdx);
}

std::string thread_name(const Thread& thread) {
  return block_name() + ", thread " + numbers(thread.index);
}

}  // namespace resnet_fused::cuda::on_cpu
