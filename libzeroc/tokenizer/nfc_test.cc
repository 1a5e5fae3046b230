// Form C beyond what the golden tokenizer shows: bytes that are no text.
#include "libzeroc/tokenizer/nfc.h"

#include <gtest/gtest.h>

namespace zeroc {
namespace {

std::string Nfc(std::string_view text) {
  std::string out = "kept ";
  const Status status = AppendNfc(text, &out);
  EXPECT_TRUE(status.ok()) << status.ToString();
  EXPECT_EQ(out.substr(0, 5), "kept ");
  return out.substr(5);
}

TEST(Nfc, ComposesAndReorders) {
  EXPECT_EQ(Nfc("cafe\u0301"), "caf\u00e9");
  EXPECT_EQ(Nfc("q\u0307\u0323"), "q\u0323\u0307");
  EXPECT_EQ(Nfc("\u1112\u1161\u11ab"), "\ud55c");
  EXPECT_EQ(Nfc("\u0958"), "\u0915\u093c");  // excluded from composition
  EXPECT_EQ(Nfc("\ufb01"), "\ufb01");        // compatibility characters stay
  EXPECT_EQ(Nfc(""), "");
  EXPECT_EQ(Nfc(std::string_view("a\0e\u0301", 5)), std::string_view("a\0\u00e9", 4));
}

TEST(Nfc, KeepsBytesThatAreNoTextAndComposesNothingAcrossThem) {
  EXPECT_EQ(Nfc("e\xff\xcc\x81"), "e\xff\xcc\x81");
  EXPECT_EQ(Nfc("\xcc"), "\xcc");
  EXPECT_EQ(Nfc("e\u0301\xe2\x82"), "\u00e9\xe2\x82");
  EXPECT_EQ(Nfc("\xed\xa0\x80"
                "e\u0301"),
            "\xed\xa0\x80\u00e9");
}

}  // namespace
}  // namespace zeroc
