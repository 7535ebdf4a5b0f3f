#include "../cpu/network.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <tuple>

#include "bindings.h"

namespace segmenter {
namespace {

// A number of the description, or a ValueError that names what is missing.
template <typename Value>
Value take(const py::dict& shape, const char* name) {
  if (!shape.contains(name)) throw std::invalid_argument(std::string("shape lacks ") + name);
  return shape[name].cast<Value>();
}

NetworkShape read_shape(const py::dict& d) {
  NetworkShape s = {};
  s.channels = take<int64_t>(d, "channels");
  s.patch = take<int64_t>(d, "patch");
  s.extra_tokens = take<int64_t>(d, "extra_tokens");
  s.width = take<int64_t>(d, "width");
  s.depth = take<int64_t>(d, "depth");
  s.heads = take<int64_t>(d, "heads");
  s.hidden = take<int64_t>(d, "hidden");
  s.block_eps = take<float>(d, "block_eps");
  s.norm_eps = take<float>(d, "norm_eps");
  s.classes = take<int64_t>(d, "classes");
  s.decoder_depth = take<int64_t>(d, "decoder_depth");
  if (s.decoder_depth > 0) {
    s.decoder_width = take<int64_t>(d, "decoder_width");
    s.decoder_heads = take<int64_t>(d, "decoder_heads");
    s.decoder_hidden = take<int64_t>(d, "decoder_hidden");
    s.decoder_block_eps = take<float>(d, "decoder_block_eps");
    s.decoder_norm_eps = take<float>(d, "decoder_norm_eps");
    s.mask_eps = take<float>(d, "mask_eps");
  }
  for (int64_t size : {s.channels, s.patch, s.width, s.depth, s.hidden, s.classes}) {
    if (size < 1) throw std::invalid_argument("shape: sizes must be positive");
  }
  if (s.extra_tokens < 0 || s.decoder_depth < 0) {
    throw std::invalid_argument("shape: sizes must not be negative");
  }
  return s;
}

// FNV-1a, eight bytes at a time.
uint64_t sample(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& bytes,
                int64_t most) {
  constexpr int64_t kLine = 64;
  uint64_t hash = 14695981039346656037u;
  const auto add = [&hash](const char* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, from + i, std::min<int64_t>(8, count - i));
      hash = (hash ^ word) * 1099511628211u;
      hash ^= hash >> 29;
    }
  };
  for (size_t p = 0; p < pointers.size(); ++p) {
    const char* from = reinterpret_cast<const char*>(pointers[p]);
    const int64_t lines = std::max<int64_t>(most / kLine, 2);
    if (bytes[p] <= lines * kLine) {
      add(from, bytes[p]);
      continue;
    }
    // The first line and the last are among them.
    for (int64_t i = 0; i < lines; ++i) add(from + (bytes[p] - kLine) * i / (lines - 1), kLine);
  }
  return hash;
}

const char* const kParts[] = {"embed", "attention", "linear", "norm", "head"};

}  // namespace

void bind_network(py::module_& m) {
  py::class_<Network>(m, "Network", R"(A Segmenter in evaluation mode, its weights packed.

Args:
    shape: channels, patch, extra_tokens, width, depth, heads, hidden, block_eps, norm_eps, classes,
        decoder_depth (0: the linear decoder) and with a mask transformer decoder_width,
        decoder_heads, decoder_hidden, decoder_block_eps, decoder_norm_eps, mask_eps.
    parameters: addresses and counts of contiguous float32 parameters by their names in the model;
        they are read now and not needed afterwards.
    dtype: "float32" or "bfloat16", of what goes into matrix products.
    quantized: kinds of layers that are taken in int8, of "qkv", "proj", "fc1", "fc2".
    threads: to pack with.
Raises:
    ValueError: a size that kernels do not take, a parameter that is missing or has another number
        of elements, an unknown kind.
    RuntimeError: int8 on a CPU without AVX-512 VNNI; see simd_level for the environment variable.)")
      .def(py::init([](const py::dict& shape,
                       const std::map<std::string, std::pair<uintptr_t, int64_t>>& addresses,
                       const std::string& dtype, const std::set<std::string>& quantized,
                       int threads) {
             Parameters parameters;
             for (const auto& [name, memory] : addresses) {
               parameters[name] = {reinterpret_cast<const float*>(memory.first), memory.second};
             }
             const NetworkShape sizes = read_shape(shape);
             const ElementType type = choose("dtype", dtype, kElementTypes);
             const SimdLevel simd = simd_level();
             py::gil_scoped_release release;
             return make_network(sizes, parameters, type, quantized, simd, threads);
           }),
           py::arg("shape"), py::arg("parameters"), py::arg("dtype"), py::arg("quantized"),
           py::arg("threads"))
      .def(
          "run",
          [](Network& network, uintptr_t images_ptr, const std::array<int64_t, 3>& size,
             uintptr_t positions_ptr, uintptr_t logits_ptr, int threads, bool timed) {
            Seconds seconds = {};
            {
              py::gil_scoped_release release;
              network.run(reinterpret_cast<const float*>(images_ptr), size[0], size[1], size[2],
                          reinterpret_cast<const float*>(positions_ptr),
                          reinterpret_cast<float*>(logits_ptr), threads,
                          timed ? &seconds : nullptr);
            }
            py::dict parts;
            for (size_t i = 0; timed && i < seconds.size(); ++i) parts[kParts[i]] = seconds[i];
            return parts;
          },
          py::arg("images_ptr"), py::arg("size"), py::arg("positions_ptr"), py::arg("logits_ptr"),
          py::arg("threads"), py::arg("timed") = false,
          R"(Patch logits of images.

Args:
    images_ptr: address of the images (B, channels, H, W), contiguous float32.
    size: (B, H, W).
    positions_ptr: address of the embeddings (extra + patches, width) that tokens begin with:
        positions, and the extra tokens added to theirs; contiguous float32.
    logits_ptr: address of the result (B, patches, K), contiguous float32; written.
    threads: at most this many threads; no result depends on it.
    timed: also measure.
Returns:
    Seconds by part, averaged over the threads: embed, attention, linear, norm, head; empty unless
    timed.)")
      .def_property_readonly("bytes", &Network::bytes, "Bytes that the packed weights take.")
      .def_property_readonly("kept", &Network::kept,
                             "Bytes of activations that are kept for the next calls.");

  m.def(
      "sample",
      [](const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& bytes, int64_t most) {
        if (pointers.size() != bytes.size()) {
          throw std::invalid_argument("sample: expected as many sizes as pointers");
        }
        py::gil_scoped_release release;
        return sample(pointers, bytes, most);
      },
      py::arg("pointers"), py::arg("bytes"), py::arg("most"),
      R"(A number that changes when memory does, looked at here and there.

Args:
    pointers: addresses; their memory must be held.
    bytes: how many there are at each.
    most: to look at, of each: all if that suffices, otherwise lines of 64 spread evenly.
Returns:
    64 bits of hash.)");

  m.def(
      "peak",
      [](const std::string& kind, int threads, double seconds) {
        const SimdLevel simd = simd_level();
        py::gil_scoped_release release;
        return peak(kind, simd, threads, seconds);
      },
      py::arg("kind"), py::arg("threads"), py::arg("seconds"),
      R"(Operations per second that products in registers alone reach.

Args:
    kind: "float32", "bfloat16" or "int8".
    threads: that run at once.
    seconds: for how long.
Returns:
    Multiplications and additions per second, each counted; 0 where the CPU has no instruction.
Raises:
    ValueError: unknown kind.)");
}

}  // namespace segmenter
