// Winograd convolution: what the launcher and the kernels agree on (winograd.cpp says the rest).
#pragma once

#include <cstdint>

#include "conv.h"
#include "kernel_types.h"
#include "weight_view.h"

namespace resnet_fused {

// How one dimension of the output is cut into tiles of `largest` outputs, the last one or two
// smaller: 7 = 4 + 3, 14 = 4 + 4 + 4 + 2, 5 = 3 + 2. A single pixel is a tile of 2 that hangs over.
struct WinogradTiles {
  int64_t length;
  int64_t largest;  // 2, 3 or 4

  int64_t count() const { return (length + largest - 1) / largest; }
  int64_t start(int64_t tile) const {
    return splits() && tile == count() - 1 ? length - 2 : tile * largest;
  }
  int64_t size(int64_t tile) const {
    if (splits() && tile >= count() - 2) return tile == count() - 1 ? 2 : largest - 1;
    const int64_t left = length - tile * largest;
    return left >= largest ? largest : left < 2 ? 2 : left;
  }

 private:
  // 4a + 1 = 4(a - 1) + 3 + 2: as many points as with a tile of one output, none of it special.
  bool splits() const { return largest > 2 && length % largest == 1 && length > 1; }
};

constexpr int64_t kWinogradMostEntries = 81;  // numbers of one channel that a tile becomes
constexpr int64_t kWinogradMostWeights = 36;  // weights of one channel that they meet
constexpr int64_t kWinogradLargestBlock = 64;
constexpr float kWinogradPoints[] = {0, 0.75f, -0.75f, 1.5f, -1.5f};

// Words of a weight that are made together where that is done in the call: of F(4 x 4) 297 KB of
// L2. A weight's floats begin one line further in the cache sets than the last one's.
constexpr int64_t kLateWords = 64;
constexpr int64_t kLateSlice = kLateWords * kPanel + 16;

struct WinogradTask {
  ConvArguments conv;
  PlainWeight plain;  // [out_channels][channels / groups][3][3], not transformed
  int64_t largest;    // outputs along one side of a tile
  bool late;          // the call transforms the weights, a part at a time; without packed ones,
                      // which are float and for m = 4, it takes the plain ones, float too
  int64_t block;      // tiles transformed and multiplied together, kWinogradLargestBlock at most

  int64_t stride() const { return conv.shape.stride[0]; }
  // Weights along one dimension: one a point, and with stride 2 one for the odd inputs, `largest`
  // of which share it.
  int64_t weights_along() const { return largest + 2; }
  int64_t weights() const { return weights_along() * weights_along(); }
  int64_t packed_weights() const { return late ? 9 : weights(); }  // of one channel
  // Numbers of one channel that a largest tile becomes.
  int64_t entries() const {
    const int64_t along = stride() == 2 ? 2 * largest + 1 : largest + 2;
    return along * along;
  }
  // Rows of a full block that meet a weight.
  int64_t most_rows(int64_t weight) const {
    const bool odd_y = stride() == 2 && weight / weights_along() == largest + 1;
    const bool odd_x = stride() == 2 && weight % weights_along() == largest + 1;
    return block * (odd_y ? largest : 1) * (odd_x ? largest : 1);
  }
  int64_t panels() const { return (conv.shape.group_out_channels() + kPanel - 1) / kPanel; }
  // Floats of one weight's matrices; 64 bytes more than they take, so that the same rows of all do
  // not fall into the same cache sets.
  int64_t input_slice(int64_t weight) const {
    return (conv.group_words() + 15) / 16 * 16 * most_rows(weight) + 16;
  }
  int64_t product_slice(int64_t weight) const { return kPanel * most_rows(weight) + 16; }
  int64_t chain() const {
    const int64_t half = (conv.group_words() + 31) / 32 * 16;
    if (conv.longest_part == 0) return int64_t(1) << 40;
    return half < conv.longest_part ? half : conv.longest_part;
  }
  bool gathers() const { return late && conv.packed == nullptr; }
  int64_t workspace() const {
    return late_taps() + (gathers() ? kLateWords * conv.per_word() * 9 * kPanel : 0);
  }
  int64_t late_taps() const { return late_weights() + (late ? weights() * kLateSlice : 0); }
  // Where the weights lie that the call transforms.
  int64_t late_weights() const {
    int64_t floats = 0;
    for (int64_t w = 0; w < weights(); ++w) floats += input_slice(w) + product_slice(w);
    return floats;
  }
};

// Tiles [first, first + count) of all images, panels [begin, end) of one group. `workspace` is 64
// byte aligned; `zeros` has as many of them as the input has channels.
using WinogradKernel = void (*)(const WinogradTask& task, int64_t first, int64_t count,
                                int64_t group, int64_t begin, int64_t end, float* workspace,
                                const void* zeros);

// Packed weights: [group][panel of 32 outputs][weight][channel or pair][32] words, or, to be
// transformed in the call (m = 4 and float32 only), [group][panel][channel][tap][32].
size_t winograd_packed_words(int64_t out_channels, int64_t group_words, int64_t groups,
                             int64_t largest, bool late);
// `weight` is [out_channels][channels][3][3], `channels` those of one group.
void winograd_pack(const double* weight, int64_t out_channels, int64_t channels, int64_t groups,
                   int64_t largest, int64_t stride, bool pairs, bool late, void* packed);
void winograd_run(const ConvArguments& conv, const PlainWeight& plain, int64_t largest, bool late);

}  // namespace resnet_fused
