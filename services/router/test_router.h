// Doubles for the router's tests: a codec whose tokens are bytes, workers that do what the test says, a sink that
// remembers.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "libzeroc/base/mutex.h"
#include "services/router/router.h"

namespace zeroc {

// Token i is the byte i; tokens of 256 and above have no text. Pieces are whole UTF-8 characters as the contract says.
class ByteCodec : public TextCodec {
 public:
  Result<std::vector<std::uint32_t>> EncodePrompt(std::string_view text) const override {
    std::vector<std::uint32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::unique_ptr<TextStream> NewStream() const override { return std::make_unique<Stream>(); }
  std::string TokenText(std::uint32_t id) const override {
    return id < 128 ? std::string(1, static_cast<char>(id)) : "";
  }
  std::string Decode(std::span<const std::uint32_t> ids) const override {
    std::string text;
    for (const std::uint32_t id : ids) text += TokenText(id);
    return text;
  }

 private:
  struct Stream : TextStream {
    std::string Push(std::uint32_t id) override {
      if (id >= 256) return "";
      held += static_cast<char>(id);
      const auto lead = static_cast<unsigned char>(held[0]);
      const std::size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
      return held.size() < length ? "" : std::exchange(held, "");
    }
    std::string Flush() override { return std::exchange(held, "").empty() ? "" : "\xef\xbf\xbd"; }
    std::string held;
  };
};

inline ServedModel TestModel() {
  ServedModel model;
  model.name = "test-model";
  model.fingerprint = "model";
  model.plan_id = "plan";
  model.max_positions = 1000;
  model.vocab_size = 300;
  model.ppl_base = 10;
  model.ladder = {
      {"bf16", 1000, true, 0, std::nullopt, 1}, {"q4", 280, true, 0.05, 0.99, 2}, {"q2", 150, true, 3.0, 0.5, 3}};
  model.codec = std::make_shared<ByteCodec>();
  return model;
}

inline v1::GenerateRequest TestRequest(const std::string& prompt, std::uint32_t max_tokens) {
  v1::GenerateRequest request;
  request.set_text(prompt);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  return request;
}

class RecordingSink : public ResponseSink {
 public:
  void Clear() {
    MutexLock lock(mu_);
    started = {};
    final = {};
    error = {};
    origin = ErrorOrigin::kRequest;
    text.clear();
    events.clear();
    n_tokens = ends = 0;
  }

  void OnStarted(const v1::Started& x) override {
    MutexLock lock(mu_);
    started = x;
    events += "started ";
  }
  void OnDelta(const v1::Delta& x) override {
    MutexLock lock(mu_);
    text += x.text();
    n_tokens += x.token_ids_size();
    events += "delta ";
  }
  void OnFinal(const v1::Final& x) override {
    MutexLock lock(mu_);
    final = x;
    events += "final ";
    ++ends;
  }
  void OnError(const Status& x, ErrorOrigin from) override {
    MutexLock lock(mu_);
    error = x;
    origin = from;
    events += "error ";
    ++ends;
  }

  // Read them from the thread that drives the flow.
  v1::Started started;
  v1::Final final;
  Status error;
  ErrorOrigin origin = ErrorOrigin::kRequest;
  std::string text, events;
  int n_tokens = 0;
  int ends = 0;

 private:
  Mutex mu_;
};

// Remembers the calls; the test answers them. Single-threaded use.
class ScriptedWorker : public WorkerConnection {
 public:
  struct Call : WorkerCall {
    void Cancel() override { ++cancels; }
    int cancels = 0;
  };

  void CheckHealth(Deadline, std::function<void(const Status&)> done) override { done(OkStatus()); }
  std::shared_ptr<WorkerCall> Reserve(const v1::ReserveRequest& request, Deadline,
                                      UnaryDone<v1::ReserveResponse> done) override {
    reserves.push_back(request);
    reserve_done.push_back(std::move(done));
    ++n_reserves;
    return std::make_shared<Call>();
  }
  std::shared_ptr<WorkerCall> Generate(const v1::DecodeRequest& request, Deadline, OnEvent<v1::DecodeEvent> on_event,
                                       StreamDone done) override {
    decodes.push_back(request);
    decode_event = std::move(on_event);
    decode_done = std::move(done);
    return decode_call = std::make_shared<Call>();
  }
  void Release(const v1::ReleaseRequest& request, Deadline, StreamDone) override { releases.push_back(request); }
  std::shared_ptr<WorkerCall> Prefill(const v1::PrefillRequest& request, Deadline, OnEvent<v1::PrefillEvent> on_event,
                                      StreamDone done) override {
    prefills.push_back(request);
    prefill_event = std::move(on_event);
    prefill_done = std::move(done);
    return prefill_call = std::make_shared<Call>();
  }

  // What the test makes the worker say.
  void Grant(std::uint64_t lease_id) {
    v1::ReserveResponse response;
    response.mutable_lease()->set_lease_id(lease_id);
    response.mutable_lease()->set_generation(lease_id * 10);
    AnswerReserve(OkStatus(), response);
  }
  void Refuse(const Status& status) { AnswerReserve(status, {}); }
  void AnswerReserve(const Status& status, const v1::ReserveResponse& response) {
    const auto done = std::move(reserve_done.front());
    reserve_done.pop_front();
    done(status, response);
  }
  void FirstToken(char c, v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED) {
    v1::PrefillEvent event;
    event.mutable_first_token()->set_id(static_cast<unsigned char>(c));
    event.mutable_first_token()->set_finish_reason(finish);
    prefill_event(event);
  }
  void Transferred() {
    v1::PrefillEvent event;
    v1::PrefillDone* done = event.mutable_done();
    done->set_wire_seconds(2);
    done->set_wire_hidden_seconds(1.5);
    done->mutable_kv_bytes()->set_raw(1000);
    done->mutable_kv_bytes()->set_packed(250);
    done->mutable_kv_bytes()->set_wire(200);
    done->set_transport("am over tcp (lo)");
    prefill_event(event);
  }
  void Admit() {
    v1::DecodeEvent event;
    event.mutable_admitted()->mutable_kv_bytes()->set_packed(240);
    decode_event(event);
  }
  void Tokens(const std::string& text) {
    v1::DecodeEvent event;
    for (const char c : text) event.mutable_tokens()->add_ids(static_cast<unsigned char>(c));
    decode_event(event);
  }
  void Final(v1::FinishReason reason) {
    v1::DecodeEvent event;
    event.mutable_final()->set_finish_reason(reason);
    decode_event(event);
  }
  void EndPrefill(const Status& status = {}) { std::exchange(prefill_done, nullptr)(status); }
  void EndDecode(const Status& status = {}) { std::exchange(decode_done, nullptr)(status); }
  // Drops every call that is open, without a word.
  void HangUp() {
    reserve_done.clear();
    decode_event = nullptr;
    prefill_event = nullptr;
    decode_done = prefill_done = nullptr;
  }

  std::vector<v1::ReserveRequest> reserves;
  std::atomic<std::size_t> n_reserves{0};  // for a test that waits for another thread's call
  std::vector<v1::DecodeRequest> decodes;
  std::vector<v1::PrefillRequest> prefills;
  std::vector<v1::ReleaseRequest> releases;
  std::deque<UnaryDone<v1::ReserveResponse>> reserve_done;  // oldest first
  OnEvent<v1::DecodeEvent> decode_event;
  OnEvent<v1::PrefillEvent> prefill_event;
  StreamDone decode_done, prefill_done;
  std::shared_ptr<Call> decode_call, prefill_call;
};

}  // namespace zeroc
