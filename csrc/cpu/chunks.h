// How a reduction over everything but the channels is cut up. The cut depends on the shape alone
// and partial sums are added in chunk order, so results are the same bit for bit at any thread
// count.
#pragma once

#include <cstdint>

#include "../common/layout.h"

namespace resnet_fused {

// inner == 1: a chunk is `size` rows of all channels, and a unit of work is a chunk.
// Otherwise:  a chunk is `size` elements of every plane of one image, and a unit is one plane's
// share. Partial results lie as [chunk][channel].
struct Unit {
  int64_t begin;    // its first row, or its first element
  int64_t length;   // elements per channel
  int64_t channel;  // its first channel
  int64_t index;    // where its first channel's partial result lies
};

struct Chunks {
  Extent extent;
  int64_t size;
  int64_t per_outer;  // chunks of one image
  int64_t count;

  // A chunk is read twice; 32768 floats stay in L2 meanwhile. At least 64 rows, so that partial
  // results are small beside the data.
  explicit Chunks(const Extent& e) : extent(e) {
    constexpr int64_t kElements = 32768;
    if (e.inner == 1) {
      size = kElements / e.channels > 64 ? kElements / e.channels : 64;
      per_outer = 1;
      count = (e.outer + size - 1) / size;
    } else {
      size = kElements;
      per_outer = (e.inner + size - 1) / size;
      count = e.outer * per_outer;
    }
  }

  int64_t units() const { return extent.inner == 1 ? count : count * extent.channels; }
  int64_t unit_size() const {
    if (extent.inner == 1) return size * extent.channels;
    return extent.inner < size ? extent.inner : size;
  }
  // Elements per channel in a chunk.
  int64_t length(int64_t chunk) const {
    const int64_t left =
        extent.inner == 1 ? extent.outer - chunk * size : extent.inner - chunk % per_outer * size;
    return left < size ? left : size;
  }
  Unit unit(int64_t u) const {
    if (extent.inner == 1) return {u * size, length(u), 0, u * extent.channels};
    const int64_t plane = u / per_outer, share = u % per_outer;
    const int64_t channel = plane % extent.channels;
    const int64_t chunk = plane / extent.channels * per_outer + share;
    return {plane * extent.inner + share * size, length(chunk), channel,
            chunk * extent.channels + channel};
  }
};

}  // namespace resnet_fused
