// Settings of one program: a typed struct filled from a YAML file (--config FILE) and from flags, flags last.
//
// Every setting states its unit, range and meaning, which --help prints. A setting that is present and wrong is an
// error, never a silent default: unknown or repeated keys, values of the wrong type or out of range all name the key
// and the line. A setting `http_port` is the YAML key `http_port` and the flag `--http-port`; the file is one flat
// mapping.
//
// Not thread-safe; used once, at start. The targets must outlive the set.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc {

struct OptionDoc {
  std::string unit;  // "ms", "bytes", "tokens", "" for none
  std::string doc;   // one sentence
};

class OptionSet {
 public:
  // `purpose` is the first line of --help.
  OptionSet(std::string program, std::string purpose);

  // The target's present value is the default. Ranges are inclusive.
  void AddString(std::string name, std::string* target, OptionDoc doc);
  void AddInt(std::string name, std::int64_t* target, std::int64_t min, std::int64_t max, OptionDoc doc);
  void AddDouble(std::string name, double* target, double min, double max, OptionDoc doc);
  void AddBool(std::string name, bool* target, OptionDoc doc);

  enum class Outcome { kRun, kHelpShown };
  // Reads --config and the flags of argv[1..). --help prints to stdout. kInvalidArgument, kNotFound (no such file).
  Result<Outcome> Parse(int argc, const char* const* argv);

  // Reads the settings of a YAML text; `name` stands for the file in messages.
  Status ReadYaml(const std::string& text, const std::string& name);

  std::string Help() const;
  // "name = value unit" for every setting, one per line, as they are now.
  std::string Effective() const;

 private:
  struct Option {
    std::string name;
    std::string type;   // STRING, INT, NUMBER, BOOL
    std::string range;  // "0..65535", "" when there is none
    std::string default_text;
    OptionDoc doc;
    std::function<Status(std::string_view)> set;
    std::function<std::string()> get;
  };

  void Add(Option option);
  const Option* Find(std::string_view name) const;
  Result<Outcome> ParseFlags(int argc, const char* const* argv);

  std::string program_;
  std::string purpose_;
  std::vector<Option> options_;
};

// "host:port", "[v6]:port"; the port in 0..65535.
struct HostPort {
  std::string host;
  int port = 0;
};
Result<HostPort> ParseHostPort(std::string_view text);

}  // namespace zeroc
