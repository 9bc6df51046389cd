// Runs a fused model without Python.
//
//     cpp_inference MODEL.pt2 INPUT.pt OUTPUT.pt [LIBRARY.so ...]
//
// MODEL.pt2 is a package that export.py made. It calls operators by name: their kernels are in the
// libraries (resnet_fused/_C_cpu.abi3.so, on a GPU _C_cuda.abi3.so as well), their schemas in the
// package, since only Python defines all of them. INPUT.pt is a tensor from torch.save, and
// OUTPUT.pt one for torch.load.

#include <dlfcn.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/library.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// What the function returns; torch's errors do not say which file they are about.
template <typename Function>
auto naming(const std::string& path, const Function& function) {
  try {
    return function();
  } catch (const c10::Error& error) {
    fail(path, ": ", error.what_without_backtrace());
  }
}

const std::string& entry(const Metadata& metadata, const std::string& name) {
  const auto found = metadata.find(name);
  if (found == metadata.end()) fail("the package has no entry ", name, ": make it with export.py");
  return found->second;
}

void load_library(const std::string& path) {
  // A path without a slash would be looked for where the system has its libraries.
  const std::string full = std::filesystem::absolute(path).string();
  if (dlopen(full.c_str(), RTLD_NOW) == nullptr) fail("cannot load the library ", dlerror());
}

// Defines the operators that no library has defined, and sees that all have a kernel.
void define_operators(const std::string& schemas, c10::DispatchKey device) {
  static torch::Library library(torch::Library::FRAGMENT, "resnet_fused", std::nullopt, __FILE__,
                                __LINE__);
  std::istringstream lines(schemas);
  for (std::string line; std::getline(lines, line);) {
    const c10::FunctionSchema wanted = torch::jit::parseSchema(line);
    auto& dispatcher = c10::Dispatcher::singleton();
    auto found = dispatcher.findSchema(wanted.operator_name());
    if (!found) {
      library.def(line.c_str());
      found = dispatcher.findSchema(wanted.operator_name());
    } else if (found->schema() != wanted) {
      fail("the package is of another version than the library: it calls ", wanted,
           ", the library has ", found->schema());
    }
    if (!found->hasComputedKernelForDispatchKey(device)) {
      fail("no library that was named has a kernel of ", wanted.name(), " for ", device,
           " tensors: name resnet_fused/_C_cpu.abi3.so, on a GPU _C_cuda.abi3.so as well");
    }
  }
}

at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot read the input ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue value = naming(path, [&] { return torch::jit::pickle_load(bytes); });
  if (!value.isTensor()) fail(path, ": expected a tensor, got a ", value.tagKind());
  return value.toTensor();
}

void write_tensor(const at::Tensor& tensor, const std::string& path) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    fail("cannot write the output ", path);
  }
}

// The input as the package was compiled for it: of one dtype, shape and layout, on its device.
at::Tensor fit(const at::Tensor& input, const std::string& description, const at::Device& device) {
  std::istringstream words(description);  // dtype, dimensions, sizes, strides
  std::string dtype;
  size_t dimensions = 0;
  words >> dtype >> dimensions;
  std::vector<int64_t> sizes(dimensions), strides(dimensions);
  for (auto* numbers : {&sizes, &strides}) {
    for (int64_t& number : *numbers) words >> number;
  }
  if (!words) fail("the package says of its input \"", description, "\": make it with export.py");
  const std::string got(c10::getDtypeNames(input.scalar_type()).first);
  if (got != dtype || input.sizes() != at::IntArrayRef(sizes)) {
    fail("input: expected ", dtype, " of shape ", at::IntArrayRef(sizes), ", got ", got,
         " of shape ", input.sizes());
  }
  return at::empty_strided(sizes, strides, input.options().device(device)).copy_(input);
}

void run(const std::vector<std::string>& arguments) {
  const std::string &model = arguments[0], &input = arguments[1], &output = arguments[2];
  for (size_t i = 3; i < arguments.size(); ++i) load_library(arguments[i]);
  if (!std::filesystem::is_regular_file(model)) fail("there is no package ", model);

  using Loader = torch::inductor::AOTIModelPackageLoader;
  // The loader looks every operator up when it is made.
  const Metadata metadata =
      naming(model, [&] { return Loader::load_metadata_from_package(model, "model"); });
  const at::Device device(entry(metadata, "AOTI_DEVICE_KEY"));
  define_operators(entry(metadata, "resnet_fused.operators"),
                   device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
  Loader loader(model);

  const c10::InferenceMode guard;
  const at::Tensor images = fit(read_tensor(input), entry(metadata, "resnet_fused.input"), device);
  const std::vector<at::Tensor> outputs = loader.run({images});
  if (outputs.size() != 1) fail("expected one output of the model, got ", outputs.size());
  const at::Tensor result = outputs[0].cpu();
  write_tensor(result, output);
  std::cout << output << ": " << c10::getDtypeNames(result.scalar_type()).first << " "
            << result.sizes() << ", first values";
  const at::Tensor first = result.flatten().slice(0, 0, 4).to(at::kDouble);
  for (int64_t i = 0; i < first.numel(); ++i) std::cout << " " << first[i].item<double>();
  std::cout << std::endl;
}

}  // namespace

int main(int count, char** words) {
  const std::vector<std::string> arguments(words + 1, words + count);
  if (arguments.size() < 3) {
    std::cerr << "usage: cpp_inference MODEL.pt2 INPUT.pt OUTPUT.pt [LIBRARY.so ...]\n";
    return 2;
  }
  try {
    run(arguments);
  } catch (const c10::Error& error) {
    std::cerr << "cpp_inference: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "cpp_inference: " << error.what() << "\n";
    return 1;
  }
}
