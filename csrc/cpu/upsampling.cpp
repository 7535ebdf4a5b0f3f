#include "upsampling.h"

#include <stdexcept>

namespace segmenter {
namespace {

[[noreturn]] void reject(const std::string& expected, const std::string& got) {
  throw std::invalid_argument("expected " + expected + ", got " + got);
}

}  // namespace

std::string shape_text(std::initializer_list<int64_t> sizes) {
  std::string text = "(";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + ")";
}

void check(const Upsampling& u) {
  if (u.B < 0 || u.K < 1 || u.h < 1 || u.w < 1) {
    reject("logits (B, K, h, w) with B >= 0 and K, h, w >= 1",
           shape_text({u.B, u.K, u.h, u.w}));
  }
  if (u.H < 1 || u.W < 1) reject("size (H, W) with H, W >= 1", shape_text({u.H, u.W}));
  if (u.top < 0 || u.left < 0 || u.height < 0 || u.width < 0 || u.height > u.H - u.top ||
      u.width > u.W - u.left) {
    reject("crop (top, left, height, width) inside size " + shape_text({u.H, u.W}),
           shape_text({u.top, u.left, u.height, u.width}));
  }
  if (u.threads < 1) reject("threads >= 1", std::to_string(u.threads));
  if (!u.empty() && !u.logits) reject("a pointer to logits", "null");
}

}  // namespace segmenter
