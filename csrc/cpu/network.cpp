#include "network.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "layer_kernel.h"
#include "memory.h"
#include "parallel.h"
#include "tiles.h"

namespace segmenter {
namespace {

// Tiles of rows that pass through a block's layers together: few enough that their activations stay
// in a core's second cache, many enough that reading the weights does not count.
constexpr int64_t kBlockTiles = 14;
// Memory for activations that a network keeps for its next calls, and of how many at once.
constexpr int64_t kKeptBytes = int64_t{256} << 20;
constexpr int kKeptWorkspaces = 16;
// Of a layer in int8: sums of products of a byte and a signed byte are counted in 32 bits.
constexpr int64_t kMostInt8Inputs = int64_t{1} << 16;

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Rows cut into blocks of whole tiles, as even as can be, and as many for each thread.
class RowBlocks {
 public:
  RowBlocks(int64_t rows, int threads)
      : rows_(rows),
        tiles_(divide_up(rows, kTileRows)),
        count_(std::min(divide_up(divide_up(tiles_, kBlockTiles), threads) * threads, tiles_)) {}

  int64_t count() const { return count_; }
  int64_t begin(int64_t block) const {
    return std::min(tiles_ * block / count_ * kTileRows, rows_);
  }
  int64_t end(int64_t block) const { return begin(block + 1); }
  int64_t most_rows() const { return count_ ? divide_up(tiles_, count_) * kTileRows : 0; }

 private:
  int64_t rows_, tiles_, count_;
};

// A linear layer and the memory of its packed weights.
struct Layer : Linear {
  Memory panel_memory, column_memory;

  int64_t bytes() const { return panel_memory.bytes() + column_memory.bytes(); }
};

struct Norm {
  std::vector<float> weight, bias;
  float eps = 0;
};

struct Block {
  Norm norm1, norm2;
  Layer qkv, proj, fc1, fc2;
};

// Blocks of one width.
struct Stage {
  int64_t width = 0, heads = 0, hidden = 0;
  std::vector<Block> blocks;
};

template <typename T>
class NetworkOf : public Network {
 public:
  NetworkOf(const NetworkShape& shape, const Parameters& parameters,
            const std::set<std::string>& quantized, SimdLevel simd, int threads)
      : shape_(shape),
        parameters_(&parameters),
        quantized_(quantized),
        simd_(simd),
        threads_(threads),
        kernels_(layer_kernels<T>(simd)) {
    if (!quantized.empty() && !kernels_.linear_int8) {
      throw std::runtime_error("int8 needs a CPU with AVX-512 VNNI; the kernels use the level " +
                               simd_level_name(simd));
    }
    const NetworkShape& s = shape_;
    check_width("width", s.width, s.heads);
    fill(embedding_, "encoder.patch_embed.proj", s.channels * s.patch * s.patch, s.width);
    fill(encoder_, "encoder.blocks.", s.depth, s.width, s.heads, s.hidden, s.block_eps);
    fill(norm_, "encoder.norm", s.width, s.norm_eps);
    if (s.decoder_depth == 0) {
      fill(head_, "decoder.head", s.width, s.classes);
    } else {
      const int64_t width = s.decoder_width;
      check_width("decoder_width", width, s.decoder_heads);
      fill(head_, "decoder.proj_dec", s.width, width);
      fill(decoder_, "decoder.blocks.", s.decoder_depth, width, s.decoder_heads, s.decoder_hidden,
           s.decoder_block_eps);
      fill(decoder_norm_, "decoder.decoder_norm", width, s.decoder_norm_eps);
      // These two are parameters by themselves, and multiply from the right.
      const float* patches = parameter("decoder.proj_patch", width * width);
      const float* classes = parameter("decoder.proj_classes", width * width);
      pack(patch_projection_, patches, nullptr, 1, width, width, width);
      pack(class_projection_, classes, nullptr, 1, width, width, width);
      copy(class_tokens_, "decoder.cls_emb", s.classes * width);
      fill(mask_norm_, "decoder.mask_norm", s.classes, s.mask_eps);
    }
    parameters_ = nullptr;
  }

  int64_t bytes() const override {
    int64_t sum =
        embedding_.bytes() + head_.bytes() + patch_projection_.bytes() + class_projection_.bytes();
    for (const Stage* stage : {&encoder_, &decoder_}) {
      for (const Block& block : stage->blocks) {
        for (const Layer* layer : {&block.qkv, &block.proj, &block.fc1, &block.fc2}) {
          sum += layer->bytes();
        }
      }
    }
    return sum;
  }

  int64_t kept() const override {
    std::lock_guard<std::mutex> lock(mutex_);
    return idle_bytes_;
  }

  void run(const float* images, int64_t B, int64_t H, int64_t W, const float* positions,
           float* logits, int threads, Seconds* seconds) override {
    if (B < 0 || H < 1 || W < 1) throw std::invalid_argument("network: images have no pixels");
    if (B == 0) return;
    Lease lease(*this);
    Call call{*lease.workspace, std::max(threads, 1), seconds};
    if (seconds) {
      seconds->fill(0);
      call.work.spent.assign(call.threads, Seconds{});
    }
    forward(call, images, B, H, W, positions, logits);
    if (seconds) {
      for (const Seconds& spent : call.work.spent) {
        for (size_t i = 0; i < spent.size(); ++i) (*seconds)[i] += spent[i] / call.threads;
      }
    }
  }

 private:
  // What one thread works in.
  struct Scratch {
    Memory rows, hidden, floats, bytes, row_scales, row_lows;
  };

  // What one call works in.
  struct Workspace {
    Memory tokens, decoder_tokens, qkv, attended, unit_patches, unit_classes, class_panels;
    AttentionMemory attention;
    std::vector<Scratch> scratch;
    std::vector<Seconds> spent;

    int64_t size() const {
      int64_t sum = attention.size();
      for (const Memory* m : {&tokens, &decoder_tokens, &qkv, &attended, &unit_patches,
                              &unit_classes, &class_panels}) {
        sum += m->bytes();
      }
      for (const Scratch& s : scratch) {
        for (const Memory* m :
             {&s.rows, &s.hidden, &s.floats, &s.bytes, &s.row_scales, &s.row_lows}) {
          sum += m->bytes();
        }
      }
      return sum;
    }
  };

  // A workspace of one's own for as long as a call takes. It never waits for the mutex, which a
  // forked child may have inherited locked by a thread that it does not have.
  struct Lease {
    explicit Lease(NetworkOf& network) : network(network) {
      std::unique_lock<std::mutex> lock(network.mutex_, std::try_to_lock);
      if (lock && network.idle_count_ > 0) {
        workspace = std::move(network.idle_[--network.idle_count_]);
        network.idle_bytes_ -= workspace->size();
      } else {
        workspace = std::make_unique<Workspace>();
      }
    }
    ~Lease() {
      const int64_t size = workspace->size();
      std::unique_lock<std::mutex> lock(network.mutex_, std::try_to_lock);
      if (!lock || network.idle_count_ == kKeptWorkspaces) return;
      if (network.idle_bytes_ + size > kKeptBytes) return;
      network.idle_bytes_ += size;
      network.idle_[network.idle_count_++] = std::move(workspace);
    }
    NetworkOf& network;
    std::unique_ptr<Workspace> workspace;
  };

  struct Call {
    Workspace& work;
    int threads;
    Seconds* seconds;

    // Adds the time of its life to a part's.
    class Timer {
     public:
      Timer(const Call& call, Part part, int worker)
          : to_(call.seconds ? &call.work.spent[worker][static_cast<size_t>(part)] : nullptr),
            start_(to_ ? Clock::now() : Clock::time_point()) {}
      ~Timer() {
        if (to_) *to_ += since(start_);
      }

     private:
      double* to_;
      Clock::time_point start_;
    };

    Timer time(Part part, int worker) const { return Timer(*this, part, worker); }
  };

  // ------------------------------------------------------------------------------ packing
  void check_width(const char* name, int64_t width, int64_t heads) const {
    if (heads < 1 || width % heads || !attends_to(width / heads)) {
      throw std::invalid_argument(std::string(name) + ": expected heads of 32, 64 or 128 channels");
    }
  }

  const float* parameter(const std::string& name, int64_t count) const {
    const auto found = parameters_->find(name);
    if (found == parameters_->end()) throw std::invalid_argument("no parameter " + name);
    if (found->second.count != count) {
      throw std::invalid_argument("parameter " + name + ": expected " + std::to_string(count) +
                                  " numbers, got " + std::to_string(found->second.count));
    }
    return found->second.data;
  }

  void copy(std::vector<float>& to, const std::string& name, int64_t count) const {
    const float* from = parameter(name, count);
    to.assign(from, from + count);
  }

  void fill(Norm& norm, const std::string& name, int64_t width, float eps) const {
    copy(norm.weight, name + ".weight", width);
    copy(norm.bias, name + ".bias", width);
    norm.eps = eps;
  }

  void fill(Layer& layer, const std::string& name, int64_t in, int64_t out,
            bool int8 = false) const {
    layer.int8 = int8;
    const float* weight = parameter(name + ".weight", in * out);
    pack(layer, weight, parameter(name + ".bias", out), in, 1, in, out);
  }

  void fill(Stage& stage, const std::string& name, int64_t depth, int64_t width, int64_t heads,
            int64_t hidden, float eps) const {
    if (hidden % 32) throw std::invalid_argument("hidden: expected a multiple of 32");
    stage.width = width;
    stage.heads = heads;
    stage.hidden = hidden;
    stage.blocks.resize(depth);
    for (int64_t i = 0; i < depth; ++i) {
      Block& block = stage.blocks[i];
      const std::string prefix = name + std::to_string(i);
      const auto is_int8 = [&](const char* kind) { return quantized_.count(kind) > 0; };
      fill(block.norm1, prefix + ".norm1", width, eps);
      fill(block.norm2, prefix + ".norm2", width, eps);
      fill(block.qkv, prefix + ".attn.qkv", width, 3 * width, is_int8("qkv"));
      fill(block.proj, prefix + ".attn.proj", width, width, is_int8("proj"));
      fill(block.fc1, prefix + ".mlp.fc1", width, hidden, is_int8("fc1"));
      fill(block.fc2, prefix + ".mlp.fc2", hidden, width, is_int8("fc2"));
    }
  }

  void pack(Layer& layer, const float* weight, const float* bias, int64_t stride_out,
            int64_t stride_in, int64_t in, int64_t out) const {
    // Four bytes are a word.
    if (in % 4) throw std::invalid_argument("expected layers of a multiple of 4 inputs");
    if (layer.int8 && in > kMostInt8Inputs) {
      throw std::invalid_argument("int8: expected layers of 65536 inputs at most");
    }
    const int64_t panel = kernels_.panel, panels = divide_up(out, panel);
    const int64_t panel_words = panel * in / (layer.int8 ? 4 : kernels_.per_word);
    layer.in = in;
    layer.out = out;
    uint32_t* words = layer.panel_memory.template room<uint32_t>(panels * panel_words);
    float* columns =
        layer.column_memory.template room<float>(panels * panel * (layer.int8 ? 3 : 1));
    if (bias) std::copy(bias, bias + out, columns);
    float *scales = columns + panels * panel, *sums = scales + panels * panel;
    parallel_for(panels, threads_, [&](int64_t i, int) {
      uint32_t* to = words + i * panel_words;
      if (layer.int8) {
        kernels_.pack_int8(weight, in, out, i, to, scales, sums);
      } else {
        kernels_.pack(weight, stride_out, stride_in, in, out, i, to);
      }
    });
    layer.panels = words;
    layer.bias = columns;
    layer.scales = scales;
    layer.sums = sums;
  }

  // ------------------------------------------------------------------------------ layers
  void linear(const Call& call, int worker, const T* x, int64_t rows, const Layer& layer,
              After after, void* out, int64_t out_stride, Part part = Part::linear) const {
    const auto timer = call.time(part, worker);
    if (!layer.int8) {
      kernels_.linear(x, layer.in, rows, layer, after, out, out_stride);
      return;
    }
    Scratch& scratch = call.work.scratch[worker];
    const int64_t padded = rows + kTileRows;
    const ByteRows bytes{scratch.bytes.template room<uint8_t>(padded * layer.in),
                         scratch.row_scales.template room<float>(padded),
                         scratch.row_lows.template room<float>(padded)};
    kernels_.to_bytes(x, layer.in, rows, layer.in, bytes);
    kernels_.linear_int8(bytes, rows, layer, after, out, out_stride);
  }

  void layer_norm(const Call& call, int worker, const float* x, int64_t rows, const Norm& norm,
                  T* out) const {
    const auto timer = call.time(Part::norm, worker);
    kernels_.layer_norm(x, rows, static_cast<int64_t>(norm.weight.size()), norm.weight.data(),
                        norm.bias.data(), norm.eps, out);
  }

  // Queries, keys and values of rows of tokens, for `block`.
  void project(const Call& call, int worker, const Block& block, const float* tokens, int64_t rows,
               T* qkv) const {
    const int64_t width = block.qkv.in;
    T* normed = call.work.scratch[worker].rows.template room<T>((rows + kTileRows) * width);
    layer_norm(call, worker, tokens, rows, block.norm1, normed);
    linear(call, worker, normed, rows, block.qkv, After::store, qkv, 3 * width);
  }

  void attend(const Call& call, const Stage& stage, int64_t B, int64_t N, const T* qkv,
              T* attended) const {
    const int64_t width = stage.width, D = width / stage.heads;
    Attention attention_call;
    attention_call.qkv = qkv;
    attention_call.type = sizeof(T) == sizeof(float) ? ElementType::float32 : ElementType::bfloat16;
    attention_call.B = B;
    attention_call.N = N;
    attention_call.H = stage.heads;
    attention_call.D = D;
    attention_call.stride_b = 3 * width * N;
    attention_call.stride_n = 3 * width;
    attention_call.stride_part = width;
    attention_call.stride_h = D;
    attention_call.scale = 1 / std::sqrt(static_cast<float>(D));
    attention_call.out = attended;
    attention_call.threads = call.threads;
    attention_call.simd = simd_;
    const auto start = Clock::now();
    attention(attention_call, call.work.attention);
    if (call.seconds) (*call.seconds)[static_cast<size_t>(Part::attention)] += since(start);
  }

  // All blocks of a stage, in place.
  void transform(const Call& call, const Stage& stage, int64_t B, int64_t N, float* tokens) const {
    const int64_t width = stage.width, rows = B * N;
    T* qkv = call.work.qkv.template room<T>((rows + kTileRows) * 3 * width);
    T* attended = call.work.attended.template room<T>((rows + kTileRows) * width);
    const RowBlocks blocks(rows, call.threads);
    parallel_for(blocks.count(), call.threads, [&](int64_t i, int worker) {
      const int64_t row = blocks.begin(i);
      project(call, worker, stage.blocks[0], tokens + row * width, blocks.end(i) - row,
              qkv + row * 3 * width);
    });
    for (size_t layer = 0; layer < stage.blocks.size(); ++layer) {
      const Block& block = stage.blocks[layer];
      const bool last = layer + 1 == stage.blocks.size();
      attend(call, stage, B, N, qkv, attended);
      parallel_for(blocks.count(), call.threads, [&](int64_t i, int worker) {
        const int64_t row = blocks.begin(i), count = blocks.end(i) - row;
        Scratch& scratch = call.work.scratch[worker];
        float* stream = tokens + row * width;
        linear(call, worker, attended + row * width, count, block.proj, After::add, stream, width);
        T* normed = scratch.rows.template room<T>((count + kTileRows) * width);
        T* hidden = scratch.hidden.template room<T>((count + kTileRows) * stage.hidden);
        layer_norm(call, worker, stream, count, block.norm2, normed);
        linear(call, worker, normed, count, block.fc1, After::gelu, hidden, stage.hidden);
        linear(call, worker, hidden, count, block.fc2, After::add, stream, width);
        if (!last) {
          project(call, worker, stage.blocks[layer + 1], stream, count, qkv + row * 3 * width);
        }
      });
    }
  }

  // ------------------------------------------------------------------------------ the network
  // Calls f(image, first row, rows, worker) for blocks of each image's `rows` rows.
  template <typename Function>
  static void for_rows(const Call& call, int64_t B, int64_t rows, const Function& f) {
    const RowBlocks blocks(rows, call.threads);
    parallel_for(B * blocks.count(), call.threads, [&](int64_t task, int worker) {
      const int64_t block = task % blocks.count();
      f(task / blocks.count(), blocks.begin(block), blocks.end(block) - blocks.begin(block),
        worker);
    });
  }

  void forward(const Call& call, const float* images, int64_t B, int64_t H, int64_t W,
               const float* positions, float* logits) const {
    const NetworkShape& s = shape_;
    const int64_t columns = divide_up(W, s.patch), patches = divide_up(H, s.patch) * columns;
    const int64_t N = s.extra_tokens + patches;
    Workspace& work = call.work;
    if (static_cast<int>(work.scratch.size()) < call.threads) work.scratch.resize(call.threads);
    float* tokens = work.tokens.template room<float>((B * N + kTileRows) * s.width);

    for (int64_t b = 0; b < B; ++b) {
      std::copy(positions, positions + s.extra_tokens * s.width, tokens + b * N * s.width);
    }
    for_rows(call, B, patches, [&](int64_t b, int64_t first, int64_t rows, int worker) {
      const auto timer = call.time(Part::embed, worker);
      const int64_t pixels = embedding_.in;
      T* read = work.scratch[worker].rows.template room<T>((rows + kTileRows) * pixels);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t patch = first + i;
        kernels_.read_patch(images + b * s.channels * H * W, s.channels, H, W, s.patch,
                            patch / columns * s.patch, patch % columns * s.patch,
                            read + i * pixels);
      }
      const float* from = positions + (s.extra_tokens + first) * s.width;
      float* to = tokens + (b * N + s.extra_tokens + first) * s.width;
      std::copy(from, from + rows * s.width, to);
      kernels_.linear(read, pixels, rows, embedding_, After::add, to, s.width);
    });
    transform(call, encoder_, B, N, tokens);

    const bool mask = s.decoder_depth > 0;
    const int64_t M = patches + s.classes, width = s.decoder_width;
    float* joined =
        mask ? work.decoder_tokens.template room<float>((B * M + kTileRows) * width) : nullptr;
    for_rows(call, B, patches, [&](int64_t b, int64_t first, int64_t rows, int worker) {
      T* normed = work.scratch[worker].rows.template room<T>((rows + kTileRows) * s.width);
      layer_norm(call, worker, tokens + (b * N + s.extra_tokens + first) * s.width, rows, norm_,
                 normed);
      if (mask) {
        linear(call, worker, normed, rows, head_, After::copy, joined + (b * M + first) * width,
               width, Part::head);
      } else {
        linear(call, worker, normed, rows, head_, After::copy,
               logits + (b * patches + first) * s.classes, s.classes, Part::head);
      }
    });
    if (!mask) return;
    for (int64_t b = 0; b < B; ++b) {
      std::copy(class_tokens_.begin(), class_tokens_.end(), joined + (b * M + patches) * width);
    }
    transform(call, decoder_, B, M, joined);
    masks(call, B, patches, joined, logits);
  }

  // Scalar products of the patches' and classes' vectors, each divided by its length.
  void masks(const Call& call, int64_t B, int64_t patches, const float* joined,
             float* logits) const {
    const int64_t K = shape_.classes, M = patches + K, width = shape_.decoder_width;
    Workspace& work = call.work;
    T* patch_vectors = work.unit_patches.template room<T>((B * patches + kTileRows) * width);
    T* class_vectors = work.unit_classes.template room<T>((B * K + kTileRows) * width);
    const auto project_rows = [&](const Layer& layer, const float* rows_in, int64_t rows,
                                  int worker, T* out) {
      Scratch& scratch = work.scratch[worker];
      T* normed = scratch.rows.template room<T>((rows + kTileRows) * width);
      float* projected = scratch.floats.template room<float>(rows * width);
      layer_norm(call, worker, rows_in, rows, decoder_norm_, normed);
      const auto timer = call.time(Part::head, worker);
      kernels_.linear(normed, width, rows, layer, After::copy, projected, width);
      kernels_.unit_length(projected, rows, width, out);
    };
    for_rows(call, B, patches, [&](int64_t b, int64_t first, int64_t rows, int worker) {
      project_rows(patch_projection_, joined + (b * M + first) * width, rows, worker,
                   patch_vectors + (b * patches + first) * width);
    });
    for_rows(call, B, K, [&](int64_t b, int64_t first, int64_t rows, int worker) {
      project_rows(class_projection_, joined + (b * M + patches + first) * width, rows, worker,
                   class_vectors + (b * K + first) * width);
    });

    // The classes' vectors are the weights of a last layer, of each image its own.
    const int64_t panel = kernels_.panel, panels = divide_up(K, panel);
    const int64_t panel_words = panel * width / kernels_.per_word;
    uint32_t* words = work.class_panels.template room<uint32_t>(B * panels * panel_words);
    parallel_for(B * panels, call.threads, [&](int64_t task, int worker) {
      const auto timer = call.time(Part::head, worker);
      const int64_t b = task / panels, first = task % panels * panel;
      kernels_.pack_rows(class_vectors + (b * K + first) * width, std::min(panel, K - first), width,
                         words + task * panel_words);
    });
    const std::vector<float> no_bias(panels * panel);
    for_rows(call, B, patches, [&](int64_t b, int64_t first, int64_t rows, int worker) {
      const auto timer = call.time(Part::head, worker);
      Linear products;
      products.in = width;
      products.out = K;
      products.panels = words + b * panels * panel_words;
      products.bias = no_bias.data();
      float* scores = work.scratch[worker].floats.template room<float>(rows * panels * panel);
      kernels_.linear(patch_vectors + (b * patches + first) * width, width, rows, products,
                      After::copy, scores, panels * panel);
      kernels_.norm_of_classes(scores, rows, K, mask_norm_.weight.data(), mask_norm_.bias.data(),
                               mask_norm_.eps, logits + (b * patches + first) * K);
    });
  }

  const NetworkShape shape_;
  const Parameters* parameters_;
  const std::set<std::string> quantized_;
  const SimdLevel simd_;
  const int threads_;
  const LayerKernels<T>& kernels_;

  Layer embedding_, head_, patch_projection_, class_projection_;
  Stage encoder_, decoder_;
  Norm norm_, decoder_norm_, mask_norm_;
  std::vector<float> class_tokens_;

  mutable std::mutex mutex_;  // of these
  std::array<std::unique_ptr<Workspace>, kKeptWorkspaces> idle_;
  int idle_count_ = 0;
  int64_t idle_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Network> make_network(const NetworkShape& shape, const Parameters& parameters,
                                      ElementType type, const std::set<std::string>& quantized,
                                      SimdLevel simd, int threads) {
  for (const std::string& kind : quantized) {
    if (kind != "qkv" && kind != "proj" && kind != "fc1" && kind != "fc2") {
      throw std::invalid_argument("quantized: expected qkv, proj, fc1 or fc2, got " + kind);
    }
  }
  if (type == ElementType::float32) {
    return std::make_unique<NetworkOf<float>>(shape, parameters, quantized, simd, threads);
  }
  return std::make_unique<NetworkOf<Bfloat16>>(shape, parameters, quantized, simd, threads);
}

double peak(const std::string& kind, SimdLevel simd, int threads, double seconds) {
  const NetworkKernels& kernels = SEGMENTER_PRODUCT_KERNELS(simd, network_kernels);
  int64_t (*spin)(int64_t) = nullptr;
  if (kind == "float32") {
    spin = kernels.float32.spin;
  } else if (kind == "bfloat16") {
    spin = simd == SimdLevel::avx512_bf16 ? kernels.bfloat16.spin : nullptr;
  } else if (kind == "int8") {
    spin = kernels.spin_int8;
  } else {
    throw std::invalid_argument("kind must be float32, bfloat16 or int8, got " + kind);
  }
  if (!spin) return 0;
  std::vector<double> rates(std::max(threads, 1));
  // As many tasks as threads, each of the same length: all run at once.
  parallel_for(static_cast<int64_t>(rates.size()), threads, [&](int64_t task, int) {
    const auto start = Clock::now();
    int64_t operations = 0;
    do {
      operations += spin(10000);
    } while (since(start) < seconds);
    rates[task] = operations / since(start);
  });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace segmenter
