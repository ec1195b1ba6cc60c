// A StoredMatrix is refused where any of its indexes would leave its bytes.
#include <vector>

#include "check.h"
#include "formats/stored_matrix.h"

using namespace muster;

namespace {

std::vector<uint8_t> q8_rows() {  // 2 rows of 3 blocks; d = 1, code = element index of the row, minus 48
  std::vector<uint8_t> data(2 * 3 * 34);
  for (uint32_t b = 0; b < 6; ++b) {
    data[b * 34 + 1] = 0x3c;
    for (uint32_t i = 0; i < 32; ++i) data[b * 34 + 2 + i] = static_cast<uint8_t>(b % 3 * 32 + i - 48 + b / 3);
  }
  return data;
}

StoredMatrix matrix_of(const std::vector<uint8_t>& data) {
  StoredMatrix m;
  m.type = StoredType::q8_0;
  m.rows = 2;
  m.cols = 50;
  m.col_first = 20;
  m.row_bytes = 102;
  m.data = data;
  return m;
}

std::string refused(const StoredMatrix& m) { return check_matrix(m).field; }

}  // namespace

TEST("a row is read from a column inside a block on") {
  const std::vector<uint8_t> data = q8_rows();
  const StoredMatrix m = matrix_of(data);
  CHECK_OK(check_matrix(m));
  std::vector<float> row(50);
  for (uint32_t r = 0; r < 2; ++r) {
    read_row(m, r, row.data());
    for (uint32_t c = 0; c < 50; ++c) CHECK_EQ(row[c], static_cast<float>(static_cast<int>(c + 20 + r) - 48));
  }
}

TEST("shapes that leave their bytes are refused by the name of the field") {
  const std::vector<uint8_t> data = q8_rows();
  StoredMatrix m = matrix_of(data);
  m.cols = 76;  // 20 + 76 = 96: the last column there is
  CHECK_EQ(refused(m), "");
  m.cols = 77;
  CHECK_EQ(refused(m), "row_bytes");
  m = matrix_of(data);
  m.cols = UINT32_MAX;
  CHECK_EQ(refused(m), "cols");
  m = matrix_of(data);
  m.rows = 3;
  CHECK_EQ(refused(m), "data");
  m = matrix_of(data);
  m.rows = UINT32_MAX;
  m.row_bytes = uint64_t{1} << 62;  // rows * row_bytes wraps
  CHECK_EQ(refused(m), "data");
  m = matrix_of(data);
  m.data = m.data.first(203);
  CHECK_EQ(refused(m), "data");
  m = matrix_of(data);
  m.rows = 0;
  CHECK_EQ(refused(m), "rows");
  m = matrix_of(data);
  m.type = static_cast<StoredType>(31);
  CHECK(check_matrix(m).code == Status::Code::unsupported);
}

TEST("stacked parts agree in width; none is no weight") {
  const std::vector<uint8_t> data = q8_rows();
  std::vector<StoredMatrix> parts{matrix_of(data), matrix_of(data)};
  CHECK_OK(check_parts(parts));
  parts[1].cols = 49;
  CHECK_EQ(check_parts(parts).field, "parts");
  CHECK_EQ(check_parts({}).field, "parts");
}

MUSTER_TEST_MAIN
