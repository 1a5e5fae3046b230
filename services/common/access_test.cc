#include "services/common/access.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

namespace zeroc {
namespace {

constexpr char kOne[] = "0123456789abcdef-one";
constexpr char kTwo[] = "0123456789abcdef-two";

class AccessTest : public testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove(file_); }
  void Write(const std::string& text) {
    std::ofstream(file_ + ".new") << text;
    std::filesystem::rename(file_ + ".new", file_);
  }
  std::unique_ptr<AccessControl> Open(double per_minute = 0, std::int64_t in_flight_max = 0) {
    Result<std::unique_ptr<AccessControl>> opened = AccessControl::Open({file_, per_minute, in_flight_max});
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    return opened.ok() ? std::move(*opened) : nullptr;
  }
  const std::string file_ = testing::TempDir() + "access_" + std::to_string(getpid());
};

TEST_F(AccessTest, OnlyKnownKeysMayAsk) {
  Write(std::string("# comment\n\nalice ") + kOne + "\nbob\t" + kTwo + "\n");
  const auto access = Open();
  EXPECT_EQ(access->Admit(std::string("Bearer ") + kOne).client, "alice");
  EXPECT_EQ(access->Admit(std::string("bearer ") + kTwo).client, "bob");
  for (const std::string& header :
       {std::string(), std::string("Bearer "), std::string(kOne), std::string("Basic ") + kOne,
        std::string("Bearer ") + kOne + "x", std::string("Bearer ") + std::string(kOne).substr(0, 19),
        std::string("Bearer ") + kOne + kOne, "Bearer " + std::string(100'000, '0')}) {
    const AccessControl::Decision decision = access->Admit(header);
    EXPECT_EQ(decision.status.code(), StatusCode::kUnauthenticated) << header.substr(0, 40);
    EXPECT_EQ(decision.status.message().find("0123456789"), std::string::npos) << "no key in a message";
  }
}

TEST_F(AccessTest, AChangedFileIsReadAgainAndABadOneIsNot) {
  Write(std::string("alice ") + kOne);
  const auto access = Open();
  const auto known = [&](const char* key) { return access->Admit(std::string("Bearer ") + key).status.ok(); };
  ASSERT_TRUE(known(kOne));
  Write(std::string("bob ") + kTwo);
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_TRUE(known(kTwo));
  EXPECT_FALSE(known(kOne)) << "a key that was taken out";
  Write("nonsense");
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  EXPECT_TRUE(known(kTwo));
}

TEST_F(AccessTest, EveryKeyHasItsOwnRate) {
  Write(std::string("alice ") + kOne + "\nbob " + kTwo);
  const auto access = Open(12);  // two at once, then one in five seconds
  const auto ask = [&](const char* key) { return access->Admit(std::string("Bearer ") + key); };
  EXPECT_TRUE(ask(kOne).status.ok());
  EXPECT_TRUE(ask(kOne).status.ok());
  const AccessControl::Decision refused = ask(kOne);
  EXPECT_EQ(refused.status.code(), StatusCode::kResourceExhausted);
  EXPECT_GE(refused.retry_after_s, 1);
  EXPECT_LE(refused.retry_after_s, 5);
  EXPECT_TRUE(ask(kTwo).status.ok());
}

TEST_F(AccessTest, EveryKeyHasItsOwnPlacesAndGivesThemBack) {
  Write(std::string("alice ") + kOne + "\nbob " + kTwo);
  auto access = Open(0, 2);
  const auto ask = [&](const char* key) { return access->Admit(std::string("Bearer ") + key); };
  const AccessControl::Decision first = ask(kOne);
  AccessControl::Decision second = ask(kOne);
  ASSERT_TRUE(first.status.ok() && second.status.ok());
  EXPECT_EQ(ask(kOne).status.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(ask(kTwo).status.ok());
  second.pass.reset();
  second = ask(kOne);
  EXPECT_TRUE(second.status.ok());
  access.reset();  // what is in flight may end later
}

TEST_F(AccessTest, WithoutAFileEverybodyIsOneClient) {
  const auto access = AccessControl::Open({"", 6});
  ASSERT_TRUE(access.ok());
  EXPECT_EQ((*access)->Admit("").client, "anyone");
  EXPECT_FALSE((*access)->Admit("Bearer whatever").status.ok()) << "the limit is everybody's";
  EXPECT_FALSE(AccessControl::Open({"/no/such/file"}).ok());
}

TEST(ApiKeys, BadFilesAreNamedByLineWithoutTheKey) {
  const std::pair<std::string, const char*> cases[] = {
      {"", "f: holds no key"},
      {"# only\n", "f: holds no key"},
      {"alice", "f: line 1: is not a name"},
      {"alice short-secret", "f: line 1: the key is not"},
      {std::string("alice ") + kOne + " more", "f: line 1: has more"},
      {std::string("alice ") + kOne + "\nalice " + kTwo, "f: line 2: the name stands there twice"},
      {"alice " + std::string(300, 'k'), "f: line 1: the key is not"},
      {std::string("alice ") + kOne + "\xff", "f: line 1: the key is not"},
  };
  for (const auto& [text, expected] : cases) {
    const auto keys = ParseApiKeys(text, "f");
    ASSERT_FALSE(keys.ok()) << text;
    EXPECT_TRUE(keys.status().message().starts_with(expected)) << keys.status().ToString();
    EXPECT_EQ(keys.status().message().find("secret"), std::string::npos);
    EXPECT_EQ(keys.status().message().find("0123456789"), std::string::npos);
  }
}

TEST(SameSecret, ComparesWhole) {
  EXPECT_TRUE(SameSecret("abc", "abc"));
  for (const char* other : {"", "ab", "abd", "abcd", "abcabc", "Abc"}) EXPECT_FALSE(SameSecret(other, "abc")) << other;
  EXPECT_FALSE(SameSecret("a", ""));
}

}  // namespace
}  // namespace zeroc
