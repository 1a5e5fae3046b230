#include "libzeroc/tokenizer/stop_matcher.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

namespace zeroc {
namespace {

TEST(StopMatcher, DoesNotDependOnThePieces) {
  const std::vector<std::string> stops{"END", "ENDE", "\n\n", "abab", "ü!"};
  const struct {
    std::string text, shown;
    bool stopped;
  } cases[] = {{"hello END world", "hello ", true},
               {"EN D EEND", "EN D E", true},
               {"abaabab", "aba", true},
               {"line\nline\n\nrest", "line\nline", true},
               {"no stop EN", "no stop EN", false},
               {"", "", false},
               {"xü!y", "x", true},
               {"ababab", "", true},
               {"a\n", "a\n", false}};
  for (const auto& c : cases) {
    for (std::size_t piece = 1; piece <= c.text.size() + 1; ++piece) {
      StopMatcher matcher(stops);
      std::string shown;
      bool stopped = false;
      for (std::size_t i = 0; i < c.text.size() && !stopped; i += piece) {
        const StopMatcher::Output output = matcher.Push(std::string_view(c.text).substr(i, piece));
        shown += output.text;
        stopped = output.stopped;
      }
      if (!stopped) shown += matcher.Flush();
      EXPECT_EQ(shown, c.shown) << c.text << " in pieces of " << piece;
      EXPECT_EQ(stopped, c.stopped) << c.text << " in pieces of " << piece;
    }
  }
}

TEST(StopMatcher, TellsWhichStringItWas) {
  EXPECT_EQ(StopMatcher({"b", "a"}).Push("xab").stop, "a") << "the earliest";
  EXPECT_EQ(StopMatcher({"ENDE", "END"}).Push("ENDE").stop, "ENDE") << "the first listed";
  EXPECT_EQ(StopMatcher({"b"}).Push("x").stop, "");
}

TEST(StopMatcher, HoldsBackNoMoreThanNeeded) {
  StopMatcher matcher({"STOP"});
  EXPECT_EQ(matcher.Push("abc").text, "abc");
  EXPECT_EQ(matcher.Push("deST").text, "de");
  EXPECT_EQ(matcher.Push("A").text, "STA");
  StopMatcher none({});
  EXPECT_EQ(none.Push("abc").text, "abc");
}

TEST(StopMatcher, NeverCutsACharacter) {
  StopMatcher matcher({"\xc3\xa9t\xc3\xa9"});
  EXPECT_EQ(matcher.Push("ab\xc3\xa9").text, "ab");
  EXPECT_EQ(matcher.Push("t\xc3\xa8").text, "\xc3\xa9t\xc3\xa8");
}

}  // namespace
}  // namespace zeroc
