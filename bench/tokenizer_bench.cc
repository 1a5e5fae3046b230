// Encode and decode rates on a text file: ZEROC_BENCH_TEXT, else ../shared/eval/wikitext-2-test.txt, else a made-up
// text (run from the root of the repository).
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "libzeroc/base/check.h"
#include "libzeroc/tokenizer/tokenizer.h"

namespace zeroc {
namespace {

const Tokenizer& Demo() {
  static const auto tokenizer = Tokenizer::Open("models/zeroc-demo");
  ZEROC_CHECK(tokenizer.ok(), tokenizer.status().ToString());
  return **tokenizer;
}

std::string ReadText() {
  const char* const path = std::getenv("ZEROC_BENCH_TEXT");
  std::ifstream in(path != nullptr ? path : "../shared/eval/wikitext-2-test.txt", std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  for (int i = 0; text.size() < 1 << 20; ++i)
    text += "made-up word" + std::to_string(i * 7919 % 10007) + ", and so on.\n";
  return text;
}

const std::string& Text() {
  static const std::string text = ReadText();
  return text;
}

void SetRate(benchmark::State& state, std::size_t bytes) {
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}

void BM_EncodeText(benchmark::State& state) {
  const std::string_view text = std::string_view(Text()).substr(0, static_cast<std::size_t>(state.range(0)));
  const auto once = Demo().Encode(text);
  ZEROC_CHECK(once.ok() && Demo().Decode(*once) == text);
  for (auto _ : state) benchmark::DoNotOptimize(Demo().Encode(text));
  SetRate(state, text.size());
  state.counters["ids"] = static_cast<double>(once->size());
}
BENCHMARK(BM_EncodeText)->Arg(100)->Arg(10'000)->Arg(2 << 20)->Unit(benchmark::kMicrosecond);

void BM_EncodeOneLongWord(benchmark::State& state) {
  const std::string word(static_cast<std::size_t>(state.range(0)), 'a');
  for (auto _ : state) benchmark::DoNotOptimize(Demo().Encode(word));
  SetRate(state, word.size());
}
BENCHMARK(BM_EncodeOneLongWord)->Arg(1 << 10)->Arg(1 << 20)->Unit(benchmark::kMicrosecond);

void BM_DecodeText(benchmark::State& state) {
  const auto ids = Demo().Encode(Text());
  ZEROC_CHECK(ids.ok(), ids.status().ToString());
  for (auto _ : state) benchmark::DoNotOptimize(Demo().Decode(*ids));
  SetRate(state, Text().size());
}
BENCHMARK(BM_DecodeText)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace zeroc

BENCHMARK_MAIN();
