// The kernels of rows.h.

#include "rows.h"

namespace megatron_rltd {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 8;  // loads of a thread before its first store

// A group of lanes copies a row at a time: all of a warp for rows of kInFlight loads and more.
template <Op op, typename Vector>
__global__ void __launch_bounds__(kThreads) move_kernel(const Move move, const int lanes) {
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / lanes;
  if (item >= num_items<op>(move)) return;
  const Copy copy = copy_of<op>(move, static_cast<int32_t>(item));
  if (copy.to == nullptr) return;
  const auto* from = reinterpret_cast<const Vector*>(copy.from);
  auto* to = reinterpret_cast<Vector*>(copy.to);
  const int64_t vectors = move.row_bytes / sizeof(Vector);
  for (int64_t first = lane; first < vectors; first += lanes * kInFlight) {
    Vector loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * lanes < vectors) loaded[i] = from[first + i * lanes];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * lanes < vectors) to[first + i * lanes] = loaded[i];
    }
  }
}

template <Op op, typename Vector>
int launch(const Move& move, cudaStream_t stream) {
  const int64_t items = num_items<op>(move);
  const int64_t vectors = move.row_bytes / static_cast<int64_t>(sizeof(Vector));
  if (items == 0 || vectors == 0) return cudaSuccess;
  int lanes = 1;
  while (lanes < 32 && lanes < vectors) lanes *= 2;
  const int64_t blocks = (items * lanes + kThreads - 1) / kThreads;
  auto* kernel = move_kernel<op, Vector>;
  LAUNCH(kernel, blocks, kThreads, stream, move, lanes);
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

// A warp makes a row of the mask.
__global__ void __launch_bounds__(kThreads) select_mask_kernel(const MaskSelection selection) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t rows =
      static_cast<int64_t>(selection.batch) * selection.heads * selection.num_rows;
  if (row >= rows) return;
  const uint8_t* from = mask_row(selection, row);
  const int32_t* columns = mask_columns(selection, row);
  uint8_t* to = selection.out + row * selection.num_columns;
  for (int32_t column = threadIdx.x % 32; column < selection.num_columns; column += 32) {
    to[column] = from[columns[column]];
  }
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
  const int64_t rows =
      static_cast<int64_t>(selection.batch) * selection.heads * selection.num_rows;
  if (rows == 0 || selection.num_columns == 0) return cudaSuccess;
  const int64_t blocks = (rows * 32 + kThreads - 1) / kThreads;
  LAUNCH(select_mask_kernel, blocks, kThreads, static_cast<cudaStream_t>(stream), selection);
  return cudaGetLastError();
}

}  // namespace megatron_rltd
