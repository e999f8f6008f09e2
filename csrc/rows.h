// Moving rows of hidden states: which row goes where. The definition is megatron_rltd/tokens/reference.py.
//
// Shapes: s sequence length on this rank, b micro batch, h hidden size, k kept tokens; m kept tokens
// of the next layer. Hidden states are [s, b, h]; indices [b, k] int32, distinct and ascending in
// each row of b. An element is bytes here, so that any dtype works.
#pragma once

#include "common.h"

namespace megatron_rltd {

// Rows [n, b, h] of a tensor. Strides in bytes; h is contiguous.
struct Rows {
  char* data;
  int64_t row_stride;
  int64_t batch_stride;

  HOST_DEVICE char* at(int64_t row, int64_t sample) const {
    return data + row * row_stride + sample * batch_stride;
  }
};

enum class Op { gather, scatter, split, exchange, merge };

struct Move {
  Rows hidden;   // [s, b, h], only read: gather, scatter, split
  Rows tokens;   // [k, b, h]
  Rows buffer;   // [s, b, h]: the result of scatter and split, the one of exchange and merge
  Rows next;     // [m, b, h]: the result of exchange
  const int32_t* indices;       // [b, k]
  const int32_t* next_indices;  // [b, m]
  int32_t length, batch, kept, next_kept;
  int64_t row_bytes;
};

// One row to copy; to is null if there is none.
struct Copy {
  const char* from;
  char* to;
};

// Where value stands in n ascending numbers, or -1.
HOST_DEVICE int32_t find(const int32_t* sorted, int32_t n, int32_t value) {
  int32_t low = 0, high = n;
  while (low < high) {
    const int32_t middle = (low + high) >> 1;
    if (sorted[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < n && sorted[low] == value ? low : -1;
}

// The rows that an operation looks at. Fewer than 2^31, which the caller checks.
template <Op op>
HOST_DEVICE int32_t num_items(const Move& move) {
  if (op == Op::gather || op == Op::merge) return move.kept * move.batch;
  if (op == Op::exchange) return (move.kept + move.next_kept) * move.batch;
  return move.length * move.batch;
}

// What to copy for one of them. Each row of a result is written by exactly one item, and no item
// reads a row that another writes.
template <Op op>
HOST_DEVICE Copy copy_of(const Move& move, int32_t item) {
  int32_t row = item / move.batch;
  const int32_t sample = item - row * move.batch;
  const int32_t* indices = move.indices + static_cast<int64_t>(sample) * move.kept;
  if (op == Op::gather) {
    return {move.hidden.at(indices[row], sample), move.tokens.at(row, sample)};
  }
  if (op == Op::merge) {
    return {move.tokens.at(row, sample), move.buffer.at(indices[row], sample)};
  }
  if (op == Op::exchange) {
    const int32_t* next = move.next_indices + static_cast<int64_t>(sample) * move.next_kept;
    if (row < move.kept) {  // a row that the last layer kept
      const int32_t place = find(next, move.next_kept, indices[row]);
      return {move.tokens.at(row, sample), place < 0 ? move.buffer.at(indices[row], sample)
                                                     : move.next.at(place, sample)};
    }
    row -= move.kept;  // a row that only the next layer keeps
    if (find(indices, move.kept, next[row]) >= 0) return {nullptr, nullptr};
    return {move.buffer.at(next[row], sample), move.next.at(row, sample)};
  }
  const int32_t place = find(indices, move.kept, row);
  if (op == Op::split) {
    return {move.hidden.at(row, sample),
            place < 0 ? move.buffer.at(row, sample) : move.tokens.at(place, sample)};
  }
  return {place < 0 ? move.hidden.at(row, sample) : move.tokens.at(place, sample),
          move.buffer.at(row, sample)};  // scatter
}

// The widest load, in bytes, that suits every row of a move: 16, 8, 4, 2 or 1.
inline int vector_bytes(const Move& move) {
  uint64_t bits = static_cast<uint64_t>(move.row_bytes);
  for (const Rows& rows : {move.hidden, move.tokens, move.buffer, move.next}) {
    bits |= reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(rows.row_stride) |
            static_cast<uint64_t>(rows.batch_stride);
  }
  int bytes = 16;
  while (bits % bytes) bytes /= 2;
  return bytes;
}

// On the GPU, on a stream; returns a cudaError_t.
int launch_move(Op op, const Move& move, void* stream);

// What such an error means.
const char* error_text(int error);

// Rows and columns of attention masks: out[n, a, i, j] = mask[n, a, rows[n, i], columns[n, j]], each
// element a byte. A mask of one row has that row for all i.
struct MaskSelection {
  const uint8_t* mask;     // strides below, in elements; columns are contiguous
  int64_t sample_stride, head_stride, row_stride;
  const int32_t* rows;     // [b, i]
  const int32_t* columns;  // [b, j]
  uint8_t* out;            // [b, a, i, j] contiguous
  int32_t batch, heads, num_rows, num_columns;
};

// What concerns one head of one sample, of which there are fewer than 2^31 rows in all; the caller
// checks that.
struct MaskPart {
  const uint8_t* mask;     // [s or 1, s]
  const int32_t* rows;     // [i]
  const int32_t* columns;  // [j]
  uint8_t* out;            // [i, j]
};

HOST_DEVICE MaskPart mask_part(const MaskSelection& s, int32_t number) {
  const int32_t sample = number / s.heads;
  const int32_t head = number - sample * s.heads;
  return {s.mask + sample * s.sample_stride + head * s.head_stride,
          s.rows + static_cast<int64_t>(sample) * s.num_rows,
          s.columns + static_cast<int64_t>(sample) * s.num_columns,
          s.out + static_cast<int64_t>(number) * s.num_rows * s.num_columns};
}

HOST_DEVICE const uint8_t* mask_row(const MaskSelection& s, const MaskPart& part, int32_t i) {
  return part.mask + (s.row_stride == 0 ? 0 : part.rows[i] * s.row_stride);
}

int launch_select_mask(const MaskSelection& selection, void* stream);

}  // namespace megatron_rltd
