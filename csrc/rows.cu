// The kernels of rows.h.

#include <algorithm>

#include "rows.h"

namespace megatron_rltd {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kInFlight = 8;  // loads of a thread before its first store
constexpr int kBlocks = 4;    // that an SM can hold at least: 64 registers for a thread
constexpr int kMaskRows = 4;  // rows of a thread

// A warp copies a row. That it is always a whole one, with lanes to spare for rows of less than 512
// bytes, makes the offsets of its loads constants, which need no registers.
template <Op op, typename Vector>
__global__ void __launch_bounds__(kThreads, kBlocks) move_kernel(const Move move) {
  const int32_t lane = threadIdx.x % kWarp;
  const uint32_t item = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= static_cast<uint32_t>(num_items<op>(move))) return;
  const Copy copy = copy_of<op>(move, static_cast<int32_t>(item));
  if (copy.to == nullptr) return;
  const auto* from = reinterpret_cast<const Vector*>(copy.from);
  auto* to = reinterpret_cast<Vector*>(copy.to);
  const auto vectors = static_cast<int32_t>(move.row_bytes / sizeof(Vector));
  for (int32_t first = lane; first < vectors; first += kWarp * kInFlight) {
    Vector loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < vectors) loaded[i] = from[first + i * kWarp];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kWarp < vectors) to[first + i * kWarp] = loaded[i];
    }
  }
}

// Blocks for n threads, or groups of threads of which a block has `in_block`.
int64_t blocks_for(int64_t n, int64_t in_block) { return (n + in_block - 1) / in_block; }

template <Op op, typename Vector>
int launch(const Move& move, cudaStream_t stream) {
  const int64_t items = num_items<op>(move);
  if (items == 0 || move.row_bytes == 0) return cudaSuccess;
  auto* kernel = move_kernel<op, Vector>;
  LAUNCH(kernel, blocks_for(items, kThreads / kWarp), kThreads, stream, move);
  return cudaGetLastError();
}

template <Op op>
int launch(const Move& move, cudaStream_t stream) {
  switch (vector_bytes(move)) {
    case 16: return launch<op, uint4>(move, stream);
    case 8: return launch<op, uint2>(move, stream);
    case 4: return launch<op, uint32_t>(move, stream);
    case 2: return launch<op, uint16_t>(move, stream);
    default: return launch<op, uint8_t>(move, stream);
  }
}

// A group of lanes makes kMaskRows rows of the mask. A thread reads the indices of its columns, of
// which a Word holds one in each byte, once for all these rows.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    select_mask_kernel(const MaskSelection selection, const int32_t groups_of_part,
                       const int log2_lanes) {
  constexpr int kColumns = sizeof(Word);
  const int32_t lanes = 1 << log2_lanes;
  const uint32_t group = blockIdx.x * (kThreads >> log2_lanes) + (threadIdx.x >> log2_lanes);
  const auto number = static_cast<int32_t>(group / groups_of_part);
  if (number >= selection.batch * selection.heads) return;
  const MaskPart part = mask_part(selection, number);
  const int32_t first = static_cast<int32_t>(group % groups_of_part) * kMaskRows;
  const uint8_t* from[kMaskRows];
#pragma unroll
  for (int i = 0; i < kMaskRows; ++i) {  // the last group may read the last row again
    from[i] = mask_row(selection, part, min(first + i, selection.num_rows - 1));
  }
  const int32_t words = selection.num_columns / kColumns;
  for (int32_t word = threadIdx.x & (lanes - 1); word < words; word += lanes) {
    int32_t columns[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) columns[j] = part.columns[word * kColumns + j];
    Word made[kMaskRows] = {};
#pragma unroll
    for (int i = 0; i < kMaskRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) made[i] |= static_cast<Word>(from[i][columns[j]]) << 8 * j;
    }
#pragma unroll
    for (int i = 0; i < kMaskRows; ++i) {
      if (first + i >= selection.num_rows) break;
      uint8_t* to = part.out + static_cast<int64_t>(first + i) * selection.num_columns;
      reinterpret_cast<Word*>(to)[word] = made[i];
    }
  }
}

template <typename Word>
int launch(const MaskSelection& selection, cudaStream_t stream) {
  const int64_t parts = static_cast<int64_t>(selection.batch) * selection.heads;
  const int64_t groups_of_part = blocks_for(selection.num_rows, kMaskRows);
  const int64_t words = selection.num_columns / sizeof(Word);
  if (parts * groups_of_part * words == 0) return cudaSuccess;
  int log2_lanes = 0;
  while (1 << log2_lanes < std::min<int64_t>(words, kThreads)) ++log2_lanes;
  const int64_t blocks = blocks_for(parts * groups_of_part, kThreads >> log2_lanes);
  LAUNCH(select_mask_kernel<Word>, blocks, kThreads, stream, selection,
         static_cast<int32_t>(groups_of_part), log2_lanes);
  return cudaGetLastError();
}

}  // namespace

int launch_move(Op op, const Move& move, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (op) {
    case Op::gather: return launch<Op::gather>(move, cuda_stream);
    case Op::scatter: return launch<Op::scatter>(move, cuda_stream);
    case Op::split: return launch<Op::split>(move, cuda_stream);
    case Op::exchange: return launch<Op::exchange>(move, cuda_stream);
    default: return launch<Op::merge>(move, cuda_stream);
  }
}

const char* error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int launch_select_mask(const MaskSelection& selection, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  // Rows of the result start where the last one ends.
  return selection.num_columns % 4 == 0 ? launch<uint32_t>(selection, cuda_stream)
                                        : launch<uint8_t>(selection, cuda_stream);
}

}  // namespace megatron_rltd
