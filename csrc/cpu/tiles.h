// How rows are divided for matrix kernels, which take a few at a time.
#pragma once

#include <cstdint>

namespace segmenter {
namespace {

// Rows of a tile (products.h): kernels read whole tiles of their left side.
constexpr int64_t kTileRows = 6;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace segmenter
