// Python module segmenter_fast._C, one file per operation. Kernels take addresses, sizes and
// strides, never tensors, so one build serves every version of PyTorch.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "../cpu/attention.h"
#include "../cpu/attention_gradient.h"
#include "../cpu/confusion.h"
#include "../cpu/upsample_argmax.h"
#include "../cpu/upsampling.h"
#include "../cpu/windows.h"

namespace segmenter {

namespace py = pybind11;

// The value that `name` stands for, or a ValueError that lists the names.
template <typename Value>
Value choose(const char* argument, const std::string& name,
             const std::map<std::string, Value>& choices) {
  const auto found = choices.find(name);
  if (found != choices.end()) return found->second;
  std::string expected;
  for (const auto& choice : choices) {
    expected += (expected.empty() ? "\"" : ", \"") + choice.first + "\"";
  }
  throw std::invalid_argument(std::string(argument) + ": expected one of " + expected + ", got \"" +
                              name + "\"");
}

inline const std::map<std::string, FloatType> kFloatTypes = {{"float32", FloatType::float32},
                                                             {"float64", FloatType::float64}};
inline const std::map<std::string, ElementType> kElementTypes = {
    {"float32", ElementType::float32}, {"bfloat16", ElementType::bfloat16}};
inline const std::map<std::string, LabelType> kLabelTypes = {
    {"uint8", LabelType::uint8}, {"int16", LabelType::int16}, {"int32", LabelType::int32}};

inline const std::map<std::string, IntegerType> kIntegerTypes = {{"uint8", IntegerType::uint8},
                                                                 {"int16", IntegerType::int16},
                                                                 {"int32", IntegerType::int32},
                                                                 {"int64", IntegerType::int64}};

void bind_attention(py::module_& m);
void bind_confusion(py::module_& m);
void bind_cuda(py::module_& m);
void bind_exponential(py::module_& m);
void bind_network(py::module_& m);
void bind_upsampling(py::module_& m);
void bind_upsample_argmax(py::module_& m);
void bind_upsample_cross_entropy(py::module_& m);
void bind_upsample_probabilities(py::module_& m);
void bind_windows(py::module_& m);

}  // namespace segmenter
