// Strings among an operator's arguments.
//
// PyTorch's conversion of one to std::string makes a copy that nobody frees, at every call (its
// headers up to 2.13, pytorch/pytorch#191340). What stands in for it here belongs into every file
// that registers an operator with strings, until no such header is left to compile with.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace resnet_fused {

struct Text : std::string {};
struct Texts : std::vector<std::string> {};

}  // namespace resnet_fused

namespace torch::stable::detail {

template <>
struct ToImpl<resnet_fused::Text> {
  static resnet_fused::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    resnet_fused::Text text;
    text.assign(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <>
struct ToImpl<resnet_fused::Texts> {
  static resnet_fused::Texts call(StableIValue value, uint64_t, bool) {
    const std::vector<resnet_fused::Text> found = to<std::vector<resnet_fused::Text>>(value);
    resnet_fused::Texts texts;
    texts.assign(found.begin(), found.end());
    return texts;
  }
};

// What TORCH_BOX makes of a parameter's type.
template <>
struct UnboxType<std::string> {
  using type = resnet_fused::Text;
};
template <>
struct UnboxType<std::vector<std::string>> {
  using type = resnet_fused::Texts;
};

}  // namespace torch::stable::detail
