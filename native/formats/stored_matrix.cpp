#include "formats/stored_matrix.h"

#include "formats/format.h"

namespace muster {

Status check_matrix(const StoredMatrix& matrix) {
  const BlockFormat* format = block_format(matrix.type);
  if (!format) return Status::unsupported("type", "stored type " + std::to_string(static_cast<int>(matrix.type)) + " is not known");
  if (matrix.rows == 0 || matrix.cols == 0) return Status::invalid("rows", "a stored matrix has at least one row and one column");
  if (matrix.cols > UINT32_MAX - matrix.col_first) return Status::invalid("cols", "a row ends past element 2^32");
  const uint64_t needed = covering_bytes(*format, 0, uint64_t{matrix.col_first} + matrix.cols);
  if (matrix.row_bytes < needed)
    return Status::invalid("row_bytes", std::to_string(matrix.row_bytes) + " bytes hold fewer than " + std::to_string(matrix.cols) + " " +
                                            format->name + " columns, which take " + std::to_string(needed));
  if (matrix.data.size() / matrix.row_bytes < matrix.rows)  // divided: rows * row_bytes could wrap
    return Status::invalid("data", std::to_string(matrix.data.size()) + " bytes hold fewer than " + std::to_string(matrix.rows) + " rows of " +
                                       std::to_string(matrix.row_bytes) + " bytes");
  return Status::ok();
}

Status check_parts(std::span<const StoredMatrix> parts) {
  if (parts.empty()) return Status::invalid("parts", "a weight has at least one part");
  uint64_t rows = 0;
  for (const StoredMatrix& part : parts) {
    MUSTER_TRY(check_matrix(part));
    if (part.cols != parts[0].cols)
      return Status::invalid("parts", "stacked parts are " + std::to_string(parts[0].cols) + " and " + std::to_string(part.cols) + " columns wide");
    rows += part.rows;
  }
  if (rows > UINT32_MAX) return Status::invalid("parts", std::to_string(rows) + " stacked rows are too many");
  return Status::ok();
}

void read_row(const StoredMatrix& matrix, uint32_t row, float* out) {
  dequantize(matrix.type, matrix.data.data() + uint64_t{row} * matrix.row_bytes, {matrix.col_first, matrix.col_first + matrix.cols}, out);
}

}  // namespace muster
