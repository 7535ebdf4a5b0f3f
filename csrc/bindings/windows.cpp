#include <array>
#include <tuple>

#include "bindings.h"

namespace segmenter {
namespace {

Taps make_taps(uintptr_t start, uintptr_t index, uintptr_t weight) {
  return {reinterpret_cast<const int32_t*>(start), reinterpret_cast<const int32_t*>(index),
          reinterpret_cast<const void*>(weight)};
}

Windows make_windows(const std::vector<WindowView>& views, const std::string& dtype, int64_t K,
                     const std::array<int64_t, 2>& size, int threads) {
  return {views, choose("dtype", dtype, kFloatTypes), K, size[0], size[1], threads, simd_level()};
}

}  // namespace

void bind_windows(py::module_& m) {
  py::class_<WindowView>(m, "WindowView",
                         R"(Patch logits of the windows of one scaled, perhaps mirrored, copy of an image.

Args:
    logits_ptr: address of the logits (rows * columns, K, h, w), windows in row-major order; they and
        the tables must outlive this object.
    windows: (rows, columns) of windows.
    patches: (h, w) of a window.
    strides: of the logits, in elements.
    y, x: addresses (start, index, weight) of the axes' tables: output i reads entries start[i] to
        start[i + 1] of index and weight. start and index are int32, weight has the logits' type.)")
      .def(py::init([](uintptr_t logits_ptr, const std::array<int64_t, 2>& windows,
                       const std::array<int64_t, 2>& patches, const std::array<int64_t, 4>& strides,
                       const std::array<uintptr_t, 3>& y, const std::array<uintptr_t, 3>& x) {
             WindowView view;
             view.logits = reinterpret_cast<const void*>(logits_ptr);
             std::tie(view.rows, view.columns) = std::tuple_cat(windows);
             std::tie(view.h, view.w) = std::tuple_cat(patches);
             std::tie(view.stride_n, view.stride_k, view.stride_y, view.stride_x) =
                 std::tuple_cat(strides);
             view.y = make_taps(y[0], y[1], y[2]);
             view.x = make_taps(x[0], x[1], x[2]);
             return view;
           }),
           py::arg("logits_ptr"), py::arg("windows"), py::arg("patches"), py::arg("strides"),
           py::arg("y"), py::arg("x"));

  m.def(
      "window_labels",
      [](const WindowView& view, const std::string& dtype, int64_t K,
         const std::array<int64_t, 2>& size, int threads, uintptr_t labels_ptr,
         const std::string& labels_dtype) {
        const Windows windows = make_windows({view}, dtype, K, size, threads);
        const LabelType type = choose("labels_dtype", labels_dtype, kLabelTypes);
        py::gil_scoped_release release;
        window_labels(windows, type, reinterpret_cast<void*>(labels_ptr));
      },
      py::arg("view"), py::arg("dtype"), py::arg("K"), py::arg("size"), py::arg("threads"),
      py::arg("labels_ptr"), py::arg("labels_dtype"),
      R"(Labels of a single view: the argmax of its logits.

Args:
    view: the windows.
    dtype: "float32" or "float64", of the logits and weights.
    K: classes.
    size: (H, W) of the output.
    threads: at most this many threads; the labels do not depend on it.
    labels_ptr: address of the labels (H, W), contiguous; written.
    labels_dtype: "uint8", "int16" or "int32"; must hold K - 1.
Raises:
    ValueError: unknown dtype, tables or sizes that make no sense.)");

  m.def(
      "window_probabilities",
      [](const std::vector<WindowView>& views, const std::string& dtype, int64_t K,
         const std::array<int64_t, 2>& size, int threads, uintptr_t labels_ptr,
         const std::string& labels_dtype, uintptr_t top1_ptr, uintptr_t all_ptr) {
        const Windows windows = make_windows(views, dtype, K, size, threads);
        const WindowOutputs outputs = {choose("labels_dtype", labels_dtype, kLabelTypes),
                                       reinterpret_cast<void*>(labels_ptr),
                                       reinterpret_cast<void*>(top1_ptr),
                                       reinterpret_cast<void*>(all_ptr)};
        py::gil_scoped_release release;
        window_probabilities(windows, outputs);
      },
      py::arg("views"), py::arg("dtype"), py::arg("K"), py::arg("size"), py::arg("threads"),
      py::arg("labels_ptr") = 0, py::arg("labels_dtype") = "int32", py::arg("top1_ptr") = 0,
      py::arg("all_ptr") = 0,
      R"(Softmax of each view's logits, averaged over the views; addresses of 0: not wanted.

Args:
    views: the windows of each view.
    dtype, K, size, threads, labels_ptr, labels_dtype: as for window_labels.
    top1_ptr: address of the largest probability (H, W), contiguous; written.
    all_ptr: address of the probabilities (K, H, W), contiguous; written.
Raises:
    ValueError: as for window_labels.)");
}

}  // namespace segmenter
