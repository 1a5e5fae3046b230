#include "tools/zeroc/request_command.h"

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "services/common/grpc_server.h"
#include "services/common/grpc_status.h"
#include "services/common/options.h"
#include "services/common/security.h"
#include "tools/zeroc/output.h"
#include "tools/zeroc/text_input.h"
#include "zeroc/v1/inference.grpc.pb.h"

namespace zeroc {
namespace {

struct Answer {
  std::string text;
  v1::Started started;
  v1::Final final;
  bool complete = false;
};

// Tokens after the first, over the time after the first; 0 when there is only one.
double TokensPerSecond(const Answer& answer) {
  const v1::RequestStats& stats = answer.final.stats();
  const double seconds = stats.jct_seconds() - stats.ttft_seconds();
  const auto n_tokens = static_cast<double>(answer.final.usage().completion_tokens());
  return n_tokens > 1 && seconds > 0 ? (n_tokens - 1) / seconds : 0;
}

double Ratio(const v1::KvBytes& bytes) {
  return bytes.wire() > 0 ? static_cast<double>(bytes.raw()) / static_cast<double>(bytes.wire()) : 0;
}

const char* FinishName(v1::FinishReason reason) { return reason == v1::FINISH_REASON_LENGTH ? "length" : "stop"; }

nlohmann::ordered_json Report(const Answer& answer) {
  const v1::Started& started = answer.started;
  const v1::RequestStats& stats = answer.final.stats();
  const v1::PhaseSeconds& phases = stats.phases();
  const v1::KvBytes& bytes = stats.kv_bytes();
  return {
      {"text", answer.text},
      {"request_id", started.request_id()},
      {"model", started.model()},
      {"finish_reason", FinishName(answer.final.finish_reason())},
      {"prompt_tokens", answer.final.usage().prompt_tokens()},
      {"completion_tokens", answer.final.usage().completion_tokens()},
      {"ttft_seconds", stats.ttft_seconds()},
      {"jct_seconds", stats.jct_seconds()},
      {"phases",
       {{"queue", phases.queue()},
        {"reserve", phases.reserve()},
        {"prefill", phases.prefill()},
        {"wire", phases.wire()},
        {"admit", phases.admit()},
        {"decode", phases.decode()}}},
      {"tokens_per_second", TokensPerSecond(answer)},
      {"kv_bytes", {{"raw", bytes.raw()}, {"packed", bytes.packed()}, {"wire", bytes.wire()}, {"ratio", Ratio(bytes)}}},
      {"profile", started.profile()},
      {"reason", started.reason()},
      {"ppl_increase", started.ppl_increase()},
      {"ppl_base", started.ppl_base()},
      {"wire_seconds", stats.wire_total_seconds()},
      {"wire_hidden_share", stats.wire_hidden_share()},
      {"transport", stats.transport()},
      {"prefill_worker", stats.prefill_worker()},
      {"decode_worker", stats.decode_worker()},
      {"attempts", stats.attempts()}};
}

std::string Ms(double seconds) { return Fixed(seconds * 1e3, 1) + " ms"; }
std::string MiB(std::uint64_t bytes) { return Fixed(static_cast<double>(bytes) / (1 << 20), 3) + " MiB"; }

std::string ReportTable(const Answer& answer) {
  const v1::Started& started = answer.started;
  const v1::RequestStats& stats = answer.final.stats();
  const v1::PhaseSeconds& phases = stats.phases();
  Table table({"request " + started.request_id(), started.model()});
  table.Add({"prompt tokens", std::to_string(answer.final.usage().prompt_tokens())});
  table.Add({"completion tokens", std::to_string(answer.final.usage().completion_tokens()) + ", finished by " +
                                      FinishName(answer.final.finish_reason())});
  table.Add({"time to first token", Ms(stats.ttft_seconds())});
  table.Add({"job completion time", Ms(stats.jct_seconds())});
  table.Add({"  queue", Ms(phases.queue())});
  table.Add({"  reserve", Ms(phases.reserve())});
  table.Add({"  prefill", Ms(phases.prefill())});
  table.Add({"  wire (not hidden)", Ms(phases.wire())});
  table.Add({"  admit", Ms(phases.admit())});
  table.Add({"  decode", Ms(phases.decode())});
  table.Add({"decode tokens/s", Fixed(TokensPerSecond(answer), 1)});
  table.Add({"KV bytes raw (bf16)", MiB(stats.kv_bytes().raw())});
  table.Add({"KV bytes packed", MiB(stats.kv_bytes().packed())});
  table.Add({"KV bytes on the wire", MiB(stats.kv_bytes().wire())});
  table.Add({"  raw / wire", Fixed(Ratio(stats.kv_bytes()), 2) + " x"});
  table.Add({"profile", started.profile() + " (reason: " + started.reason() + ")"});
  table.Add(
      {"promised perplexity increase", Fixed(started.ppl_increase(), 4) + " over " + Fixed(started.ppl_base(), 3)});
  table.Add(
      {"wire time hidden", Fixed(100 * stats.wire_hidden_share(), 1) + " % of " + Ms(stats.wire_total_seconds())});
  table.Add({"transport", stats.transport().empty() ? "-" : stats.transport()});
  table.Add({"workers", stats.prefill_worker() + " -> " + stats.decode_worker()});
  return table.ToString();
}

class RequestCommand : public Command {
 public:
  explicit RequestCommand(CLI::App& app) {
    app.add_option("--router", router_, "gRPC of the router [127.0.0.1:9000]")->option_text("HOST:PORT");
    auto* source = app.add_option_group("source");
    prompt_option_ = source->add_option("--prompt", prompt_, "the prompt")->option_text("TEXT");
    source->add_option("--prompt-file", prompt_file_, "file with the prompt, taken as bytes")->option_text("FILE");
    source->require_option(1);
    app.add_option("--max-tokens", max_tokens_, "tokens to generate at most [128]")
        ->check(CLI::Range(1, 1 << 20))
        ->option_text("N");
    app.add_option("--temperature", temperature_, "0 to 2; 0: always the most likely token [0]")->option_text("X");
    app.add_option("--top-p", top_p_, "smallest set of tokens with this probability, above 0 to 1 [1]")
        ->option_text("X");
    app.add_option("--top-k", top_k_, "only the N most likely tokens; 0: all [0]")->option_text("N");
    app.add_option("--min-p", min_p_, "only tokens at least X times as likely as the best, 0 to 1 [0]")
        ->option_text("X");
    app.add_option("--seed", seed_, "of the random draws [drawn by the router]")->option_text("N");
    app.add_option("--stop", stops_, "text that ends the completion and is cut off; may be repeated")
        ->option_text("TEXT ..");
    app.add_flag("--ignore-eos", ignore_eos_, "go on behind the end-of-text token");
    auto* budget = app.add_option("--max-ppl-increase", max_ppl_increase_,
                                  "perplexity budget, absolute; the router takes the smallest profile inside it")
                       ->option_text("X");
    app.add_option("--profile", profile_, "this profile and no other")->option_text("NAME")->excludes(budget);
    app.add_option("--request-id", request_id_, "name of the request in logs [drawn by the router]")->option_text("ID");
    app.add_option("--timeout-s", timeout_s_, "seconds until the request is given up [600]")
        ->check(CLI::Range(0.001, 86400.0))
        ->option_text("X");
    app.add_option("--tls-ca-file", security_.tls_ca_file, "PEM: talk TLS to a router that these sign [plain]")
        ->option_text("FILE");
    app.add_option("--tls-certificate-file", security_.tls_certificate_file, "PEM: our chain, where the router asks")
        ->option_text("FILE");
    app.add_option("--tls-key-file", security_.tls_key_file, "PEM: private key of the certificate")
        ->option_text("FILE");
    app.add_option("--api-key-file", api_key_file_, "file with the API key alone, where the router asks")
        ->option_text("FILE");
    app.add_flag("--json", json_, "one JSON object instead of text and table");
  }

  Status CheckUsage() override { return ParseHostPort(router_).status().WithContext("--router"); }

  Status Run() override {
    v1::GenerateRequest request;
    ZEROC_ASSIGN_OR_RETURN(request, Build());
    Answer answer;
    ZEROC_RETURN_IF_ERROR(Generate(request, &answer).WithContext("router " + router_));
    if (json_) {
      PrintJson(Report(answer));
    } else {
      std::cout << std::endl;
      std::cerr << '\n' << ReportTable(answer) << std::flush;
    }
    return OkStatus();
  }

 private:
  Result<v1::GenerateRequest> Build() {
    if (prompt_option_->count() == 0) {
      ZEROC_ASSIGN_OR_RETURN(prompt_, ReadFile(prompt_file_));
    }
    v1::GenerateRequest request;
    request.set_request_id(request_id_);
    request.set_text(prompt_);
    v1::SamplingParams& sampling = *request.mutable_sampling();
    sampling.set_max_tokens(max_tokens_);
    sampling.set_temperature(temperature_);
    sampling.set_top_p(top_p_);
    sampling.set_top_k(top_k_);
    sampling.set_min_p(min_p_);
    if (seed_.has_value()) sampling.set_seed(*seed_);
    for (const std::string& stop : stops_) sampling.add_stop(stop);
    sampling.set_ignore_eos(ignore_eos_);
    if (max_ppl_increase_.has_value()) request.mutable_kv()->set_max_ppl_increase(*max_ppl_increase_);
    if (!profile_.empty()) request.mutable_kv()->set_profile(profile_);
    return request;
  }

  // Shows the text as it comes. A stream that ends without its last message is an error even if its status is OK.
  Status Generate(const v1::GenerateRequest& request, Answer* answer) const {
    Security security;
    ZEROC_ASSIGN_OR_RETURN(security, LoadSecurity(security_));
    const auto stub = v1::Inference::NewStub(MakeGrpcChannel(router_, GrpcLimits{}, security.grpc));
    grpc::ClientContext context;
    if (!api_key_file_.empty()) {
      std::string key;
      ZEROC_ASSIGN_OR_RETURN(key, ReadSecretFile(api_key_file_));
      context.AddMetadata("authorization", "Bearer " + key);
    }
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::milliseconds(static_cast<std::int64_t>(std::lround(timeout_s_ * 1e3))));
    const auto reader = stub->Generate(&context, request);
    v1::GenerateResponse response;
    while (reader->Read(&response)) {
      if (response.has_started()) answer->started = response.started();
      if (response.has_delta()) {
        answer->text += response.delta().text();
        if (!json_) std::cout << response.delta().text() << std::flush;
      }
      if (response.has_final()) {
        answer->final = response.final();
        answer->complete = true;
      }
    }
    const Status status = FromGrpc(reader->Finish());
    if (!status.ok()) return {status.code(), status.ToString()};  // the code helps whoever reads the line
    return answer->complete ? OkStatus() : Internal("the stream ended before its last message");
  }

  std::string router_ = "127.0.0.1:9000";
  std::string prompt_, prompt_file_, profile_, request_id_, api_key_file_;
  SecurityOptions security_;
  CLI::Option* prompt_option_;
  std::uint32_t max_tokens_ = 128;
  float temperature_ = 0, top_p_ = 1, min_p_ = 0;
  std::uint32_t top_k_ = 0;
  std::optional<std::uint64_t> seed_;
  std::optional<double> max_ppl_increase_;
  std::vector<std::string> stops_;
  bool ignore_eos_ = false;
  bool json_ = false;
  double timeout_s_ = 600;
};

}  // namespace

CommandEntry AddRequestCommand(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("request", "Complete a prompt on a running cluster, with its account");
  return {app, std::make_unique<RequestCommand>(*app)};
}

}  // namespace zeroc
