#include "services/common/options.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <limits>

namespace zeroc {
namespace {

struct Settings {
  std::string name = "alpha";
  std::int64_t port = 8000;
  double budget = 0.1;
  bool fast = false;
};

OptionSet MakeSet(Settings* s) {
  OptionSet set("prog", "Does things.");
  set.AddString("name", &s->name, {"", "What it is called."});
  set.AddInt("http_port", &s->port, 1, 65535, {"port", "Where it listens."});
  set.AddDouble("budget", &s->budget, 0, 10, {"ppl", "How much."});
  set.AddBool("fast", &s->fast, {"", "Whether."});
  return set;
}

Status ParseArgs(OptionSet& set, std::vector<const char*> args) {
  args.insert(args.begin(), "prog");
  return set.Parse(static_cast<int>(args.size()), args.data()).status();
}

TEST(Options, FlagsWinOverTheFileAndTheFileOverDefaults) {
  const std::string path = testing::TempDir() + "options_test_" + std::to_string(getpid()) + ".yaml";
  std::ofstream(path) << "# comment\nhttp_port: 9000\nbudget: 2.5\nname: \"from file\"\n";
  Settings s;
  OptionSet set = MakeSet(&s);
  EXPECT_TRUE(ParseArgs(set, {"--http-port", "9100", "--config", path.c_str(), "--fast=true"}).ok());
  EXPECT_EQ(s.port, 9100);
  EXPECT_EQ(s.budget, 2.5);
  EXPECT_EQ(s.name, "from file");
  EXPECT_TRUE(s.fast);
  EXPECT_NE(set.Effective().find("http_port = 9100 port\n"), std::string::npos) << set.Effective();
  std::remove(path.c_str());
}

TEST(Options, YamlErrorsNameKeyAndLine) {
  struct Case {
    const char* yaml;
    const char* expected;
  };
  const Case cases[] = {
      {"name: x\nhttp_prt: 1\n", "f.yaml:2: http_prt: unknown setting"},
      {"budget: 1\n\nbudget: 2\n", "f.yaml:3: budget: given twice"},
      {"http_port: 70000\n", "f.yaml:1: http_port: 70000 is not in 1..65535"},
      {"http_port: 80x\n", "f.yaml:1: http_port: '80x' is not a whole number"},
      {"http_port: 8.5\n", "f.yaml:1: http_port: '8.5' is not a whole number"},
      {"budget: nan\n", "f.yaml:1: budget: nan is not in 0..10"},
      {"fast: yes\n", "f.yaml:1: fast: 'yes' is neither true nor false"},
      {"http_port: [1, 2]\n", "f.yaml:1: http_port: needs one plain value"},
      {"http_port:\n", "f.yaml:1: http_port: needs one plain value"},
      {"- a\n- b\n", "f.yaml:1: not a mapping of settings"},
      {"name: x\nbudget: {1\n", "f.yaml:"},
  };
  for (const Case& c : cases) {
    Settings s;
    OptionSet set = MakeSet(&s);
    const Status status = set.ReadYaml(c.yaml, "f.yaml");
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.yaml;
    EXPECT_TRUE(status.message().starts_with(c.expected)) << c.yaml << " gave " << status.ToString();
  }
  Settings s;
  OptionSet set = MakeSet(&s);
  EXPECT_TRUE(set.ReadYaml("", "f.yaml").ok());
}

TEST(Options, FlagErrorsNameTheFlag) {
  Settings s;
  OptionSet set = MakeSet(&s);
  EXPECT_NE(ParseArgs(set, {"--no-such", "1"}).message().find("--no-such"), std::string_view::npos);
  EXPECT_NE(ParseArgs(set, {"--http-port", "0"}).message().find("--http-port: 0 is not in"), std::string_view::npos);
  EXPECT_FALSE(ParseArgs(set, {"--http-port"}).ok());
  EXPECT_FALSE(ParseArgs(set, {"--http-port", "1", "--http-port", "2"}).ok());
  EXPECT_FALSE(ParseArgs(set, {"stray"}).ok());
  EXPECT_EQ(ParseArgs(set, {"--config", "/nonexistent/file.yaml"}).code(), StatusCode::kNotFound);
}

TEST(Options, HelpShowsUnitRangeAndDefault) {
  Settings s;
  const OptionSet set = MakeSet(&s);
  s.port = 1;  // --help shows the default, not the present value
  const std::string help = set.Help();
  EXPECT_NE(help.find("--http-port INT\n      Where it listens. [unit: port; range: 1..65535; default: 8000]"),
            std::string::npos)
      << help;
  EXPECT_NE(help.find("--fast BOOL"), std::string::npos);
}

TEST(Options, HostPort) {
  EXPECT_EQ(ParseHostPort("localhost:80")->port, 80);
  EXPECT_EQ(ParseHostPort("[::1]:9000")->host, "::1");
  for (const char* bad : {"", "host", ":80", "host:", "host:99999", "host:-1", "::1:80", "host:80 "}) {
    EXPECT_FALSE(ParseHostPort(bad).ok()) << bad;
  }
}

}  // namespace
}  // namespace zeroc
