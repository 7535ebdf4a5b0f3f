// A whole Segmenter in evaluation mode, from an image to its patch logits in one call.
//
// Weights are packed once, when the network is made. The stream of tokens that layers add to is
// float32; what goes into a matrix product is float32 or bfloat16, and in some layers int8. A block
// is three passes over the threads: keys and values are packed, queries attend, and then rows of
// tokens go through everything else, down to the next block's queries, keys and values, while they
// are in a core's own caches.
//
// Source: Strudel et al. 2021, section 3; the official segm/model.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "attention.h"
#include "simd.h"

namespace segmenter {

struct NetworkShape {
  int64_t channels, patch, extra_tokens;
  int64_t width, depth, heads, hidden;
  float block_eps, norm_eps;
  int64_t classes;
  // The mask transformer; depth 0 is the linear decoder, and the rest is not looked at then.
  int64_t decoder_width, decoder_depth, decoder_heads, decoder_hidden;
  float decoder_block_eps, decoder_norm_eps, mask_eps;
};

// Contiguous float32 numbers of the caller's.
struct Numbers {
  const float* data;
  int64_t count;
};

// Parameters by the model's names for them.
using Parameters = std::map<std::string, Numbers>;

// Where a call's time goes, in this order: seconds, averaged over its threads.
enum class Part { embed, attention, linear, norm, head, count };
using Seconds = std::array<double, static_cast<size_t>(Part::count)>;

class Network {
 public:
  virtual ~Network() = default;

  // Logits (B, patches, K), contiguous, of images (B, channels, H, W), contiguous. `positions` are
  // (extra + patches, width) numbers that tokens begin with: the position embeddings, and in the
  // first rows those of the class and the distillation token plus these tokens themselves.
  // Results do not depend on the number of threads. May be called from several threads at once.
  virtual void run(const float* images, int64_t B, int64_t H, int64_t W, const float* positions,
                   float* logits, int threads, Seconds* seconds) = 0;

  // Of the packed weights.
  virtual int64_t bytes() const = 0;

  // Of activations that are kept for the next calls.
  virtual int64_t kept() const = 0;
};

// Packs the parameters, which are not needed afterwards. `quantized` are the kinds of layers of the
// blocks that are taken in int8: of "qkv", "proj", "fc1", "fc2".
//
// Raises std::invalid_argument for sizes that the kernels do not take or a parameter that is
// missing or has another size, std::runtime_error for int8 on a level that has no instruction for
// it.
std::unique_ptr<Network> make_network(const NetworkShape& shape, const Parameters& parameters,
                                      ElementType type, const std::set<std::string>& quantized,
                                      SimdLevel simd, int threads);

// Operations per second, of which a multiplication and an addition are two, that threads reach with
// products in registers alone. `kind` is "float32", "bfloat16" or "int8"; 0 where the level has no
// instruction for it.
double peak(const std::string& kind, SimdLevel simd, int threads, double seconds);

}  // namespace segmenter
