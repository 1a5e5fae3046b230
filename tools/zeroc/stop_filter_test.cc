#include "tools/zeroc/stop_filter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

namespace zeroc {
namespace {

// What a filter must give: the text up to the first stop string.
std::string Expected(const std::string& text, const std::vector<std::string>& stops) {
  std::size_t cut = text.size();
  for (const std::string& stop : stops) cut = std::min(cut, text.find(stop));
  return text.substr(0, cut);
}

TEST(StopFilter, EveryCutOfTheTextGivesTheSame) {
  const std::vector<std::vector<std::string>> stop_sets = {{}, {"c"}, {"abab"}, {"bb", "ababc"}, {"zz"}, {"é!"}, {"a"}};
  const std::string text = "aababé!abbabc";
  for (const auto& stops : stop_sets) {
    for (std::size_t size = 1; size <= text.size(); ++size) {
      StopFilter filter(stops);
      std::string shown;
      for (std::size_t at = 0; at < text.size() && !filter.stopped();) {
        std::size_t end = std::min(text.size(), at + size);
        while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
        shown += filter.Push(text.substr(at, end - at));
        EXPECT_TRUE(text.starts_with(shown));
        at = end;
      }
      shown += filter.Flush();
      EXPECT_EQ(shown, Expected(text, stops)) << "pieces of " << size;
      EXPECT_EQ(filter.stopped(), Expected(text, stops).size() < text.size());
    }
  }
}

TEST(StopFilter, HoldsBackNoMoreThanNeeded) {
  StopFilter filter({"stop"});
  EXPECT_EQ(filter.Push("a long text"), "a long t");
  EXPECT_EQ(filter.Flush(), "ext");
}

TEST(StopFilter, NeverCutsACharacter) {
  StopFilter filter({"12345"});
  // Four bytes are held back; the cut would fall inside the two-byte character.
  EXPECT_EQ(filter.Push("ab\xc3\xa9xyz"), "ab");
  EXPECT_EQ(filter.Flush(), "\xc3\xa9xyz");
}

TEST(StopFilter, IsQuietOnceStopped) {
  StopFilter filter({"x"});
  EXPECT_EQ(filter.Push("abxcd"), "ab");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.Push("more"), "");
  EXPECT_EQ(filter.Flush(), "");
}

}  // namespace
}  // namespace zeroc
