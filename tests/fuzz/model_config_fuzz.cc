// config.json from strangers: loading never crashes, and what it accepts is valid.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "libzeroc/base/check.h"
#include "libzeroc/checkpoint/model_config.h"

namespace {

// The loader takes a folder; this one is removed at exit.
class ConfigFolder {
 public:
  ConfigFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "zeroc-fuzz-XXXXXX").string();
    ZEROC_CHECK(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~ConfigFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ConfigFolder(const ConfigFolder&) = delete;
  ConfigFolder& operator=(const ConfigFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const ConfigFolder folder;
  std::ofstream(folder.path() + "/config.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  const auto config = zeroc::LoadModelConfig(folder.path());
  if (config.ok()) {
    ZEROC_CHECK(config->Validate().ok(), config->Validate().ToString());
  } else {
    ZEROC_CHECK(!config.status().message().empty());
  }
  return 0;
}
