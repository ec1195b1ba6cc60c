// A stored part, checked and read row by row: what every backend's pack() does first. Owns the promise that no index of a
// StoredMatrix leaves its bytes; does not own layouts.
#pragma once
#include "exec/op_table.h"
#include "muster/status.h"

namespace muster {

// Shape against bytes: known type, columns inside the row's covering blocks, rows inside the data. The message says what is short.
Status check_matrix(const StoredMatrix& matrix);
// Parts of one stacked weight: at least one, each sound, all of the same width, rows below 2^32 in all.
Status check_parts(std::span<const StoredMatrix> parts);

// out[c] = kept column c of a row of a checked matrix.
void read_row(const StoredMatrix& matrix, uint32_t row, float* out);

}  // namespace muster
