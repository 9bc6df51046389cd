// Scratch memory of one call: from the pool, so on huge pages where Linux grants them, and as small
// as the launcher says; it goes back to the pool with the call.
#pragma once

#include <cstddef>
#include <utility>

namespace resnet_fused {

class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(size_t floats);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  Workspace(Workspace&& other) noexcept { *this = std::move(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  float* data() const { return data_; }  // page aligned; null if empty

 private:
  float* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace resnet_fused
