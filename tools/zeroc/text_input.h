// What commands read: text files and parts of them, lists of token ids, recall sets. All of it is foreign: sizes are
// bounded, messages name the file and the place. Stateless functions, any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

// The tokenizer takes no more in one piece.
inline constexpr std::uint64_t kTextBytesMax = std::uint64_t{256} << 20;

// The whole file. kNotFound when it cannot be opened, kInvalidArgument when it cannot be read or is too large.
Result<std::string> ReadFile(const std::string& path, std::uint64_t bytes_max = kTextBytesMax);

// FILE or FILE@A:B, the part of the file from A to B percent of its bytes (0 <= A < B <= 100), moved forward to the
// next character start, so that FILE@0:50 and FILE@50:100 together are FILE.
struct TextSlice {
  std::string path;
  double begin_percent = 0;
  double end_percent = 100;
};
// kInvalidArgument when the bounds are out of order. A suffix of another form belongs to the file's name.
Result<TextSlice> ParseTextSlice(std::string_view argument);
Result<std::string> ReadTextSlice(const TextSlice& slice);

// "1,2,3" (commas or spaces). kInvalidArgument naming the entry that is no number from 0 to 2^31 - 1.
Result<std::vector<std::int32_t>> ParseIdList(std::string_view text);

// A file that holds a JSON array of ids or an object with the field "ids". Not empty.
Result<std::vector<std::int32_t>> ReadIdsFile(const std::string& path);

struct RecallLine {
  std::string prompt;
  std::string answer;
  std::string group;  // field `group`, else `distance`, else ""
};
// One JSON object per line; blank lines are skipped. kInvalidArgument naming file and line.
Result<std::vector<RecallLine>> ReadRecallSet(const std::string& path);

// At most n_max cases, spread evenly over the groups and within each, in the order of the file. 0: all.
std::vector<RecallLine> TakeEvenly(const std::vector<RecallLine>& cases, int n_max);

}  // namespace zeroc
