// Prefill and decode over the fake network: seeded runs with delay, reordering, duplicates, loss, kills, stalls, cuts,
// cancels and expiry. The same Sender and LeaseTable as in the services; the harness only carries actions out.
//
// Held in every run: a prompt is admitted only with all its bytes right; blocks come back exactly once; a free block is
// never written (returned blocks are poisoned and looked at); every lease and every sender ends; local bytes stay until
// LocalDone.
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <random>
#include <set>

#include "libzeroc/comm/fake_transport.h"
#include "libzeroc/handoff/byte_codec.h"
#include "libzeroc/handoff/lease_table.h"
#include "libzeroc/handoff/sender.h"
#include "libzeroc/handoff/test_support.h"

namespace zeroc {
namespace {

using handoff_test::Arena;
using handoff_test::FillBlock;
using handoff_test::HoldsBlock;
using handoff_test::kLayers;
using handoff_test::kModel;
using handoff_test::kPlan;
using handoff_test::MakeFormat;

constexpr std::byte kPoison{0xa5};
constexpr std::size_t kSlabBytes = 64 << 10;

TransportOptions Options(const std::string& name) {
  TransportOptions options;
  options.name = name;
  options.piece_bytes = 4096;  // several pieces per write
  return options;
}

// What both nodes need: a clock, and work that the services do on another thread.
class Node {
 public:
  explicit Node(FakeNetwork& network) : network_(network) {}
  std::int64_t Now() const { return static_cast<std::int64_t>(network_.now_seconds() * 1e9) + 1; }

 protected:
  FakeNetwork& network_;
};

class DecodeNode final : public Node, public TransportListener {
 public:
  DecodeNode(FakeNetwork& network, const LeaseTable::Options& options, std::uint64_t seed)
      : Node(network),
        arena_(2 << 20),
        pool_(BlockPool::Create(arena_.span(), kSlabBytes).value()),
        table_(options, seed),
        transport_(network.Create(Options("decode"), *this).value()) {
    EXPECT_TRUE(transport_->RegisterArena(arena_.span()).ok());
    std::fill(arena_.span().begin(), arena_.span().end(), kPoison);
  }

  // Empty when there is no room.
  std::optional<LeaseKey> Reserve(std::uint64_t prompt_seed, const std::shared_ptr<const KvFormat>& format,
                                  int n_tokens, std::string* layout) {
    auto kv = SequenceKv::Create(*pool_, format, n_tokens + 20, 1);
    if (!kv.ok()) return std::nullopt;
    // Every other prompt's beginning is there already: those blocks are not listed, and stay poisoned to the end.
    const int n_present = std::min(format->LastingBlocksAt(n_tokens), (n_tokens - 1) / 64) *
                          static_cast<int>(prompt_seed % 2) * (1 + static_cast<int>(prompt_seed % 3)) / 3;
    const BlockTable table = BlockTable::Of(**kv, n_tokens, kModel, kPlan, n_present);
    for (const BlockExtent& extent : table.Extents()) ExpectPoison(extent);
    const LeaseKey key = table_.Create(table, Now()).value();
    *layout = table.Serialise();
    held_[key.lease_id] = {key, prompt_seed, std::move(kv).value(), table.Extents()};
    ++n_reserved_;
    return key;
  }

  void Release(const LeaseKey& key) { Do(table_.Release(key, Cancelled("the client went away"), Now())); }
  void Tick() {
    Do(table_.Tick(Now()));
    std::deque<VerifyLease> verify;
    verify.swap(to_verify_);
    for (const VerifyLease& one : verify) {
      const Status status = VerifyBlocks(arena_.span(), one.blocks);
      EXPECT_TRUE(status.ok()) << status.ToString();  // nothing here corrupts bytes
      Do(table_.OnVerified(one.lease, status, Now()));
    }
    // Admitted requests decode for a while.
    while (!running_.empty() && running_.begin()->first < Now()) {
      const LeaseKey key = running_.begin()->second;
      running_.erase(running_.begin());
      Do(table_.Release(key, OkStatus(), Now()));
    }
  }

  void CheckAllBack() {
    EXPECT_EQ(table_.n_leases(), 0u);
    EXPECT_TRUE(held_.empty());
    EXPECT_EQ(pool_->usage().bytes_used, 0u);
    EXPECT_EQ(n_returned_, n_reserved_);
    for (const std::byte b : arena_.span()) {
      if (b != kPoison) FAIL() << "a free block was written";
    }
  }

  FakeTransport& transport() { return *transport_; }
  const std::set<std::uint64_t>& admitted() const { return admitted_; }
  std::size_t n_held() const { return held_.size(); }
  int n_failed() const { return n_failed_; }

  void OnPeerUp(PeerId, const PeerInfo&) override {}
  bool AcceptWrite(PeerId peer, const WriteTag& tag, std::uint64_t offset, std::uint64_t bytes) override {
    return table_.AcceptWrite(peer, tag, offset, bytes, Now());
  }
  void OnWriteDone(PeerId, const WriteTag& tag, std::uint64_t, std::uint64_t bytes, const Status& status) override {
    Do(table_.OnWriteDone(tag, bytes, status, Now()));
  }
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override {
    ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
    ZEROC_ASSIGN_OR_RETURN(LeaseActions actions, table_.OnMessage(peer, message, Now()));
    Do(std::move(actions));
    return OkStatus();
  }
  void OnProtocolError(PeerId, const Status& status) override { ADD_FAILURE() << status.ToString(); }
  void OnPeerFailure(PeerId peer, const Status& status) override { Do(table_.OnPeerFailure(peer, status, Now())); }

 private:
  struct Held {
    LeaseKey key;
    std::uint64_t prompt_seed = 0;
    std::unique_ptr<SequenceKv> kv;
    std::vector<BlockExtent> extents;
  };

  void Do(LeaseActions actions) {
    for (LeaseAction& action : actions) {
      if (auto* send = std::get_if<SendMessage>(&action)) {
        transport_->Send(send->peer, send->message.type, AsBytes(send->message.payload), [](const Status&) {});
      } else if (auto* verify = std::get_if<VerifyLease>(&action)) {
        to_verify_.push_back(std::move(*verify));
      } else if (const auto* ready = std::get_if<LeaseReady>(&action)) {
        OnReady(*ready);
      } else if (const auto* failed = std::get_if<LeaseFailed>(&action)) {
        EXPECT_FALSE(failed->status.ok());
        EXPECT_FALSE(admitted_.contains(held_.at(failed->lease.lease_id).prompt_seed));
        ++n_failed_;
      } else {
        OnReturn(std::get<ReturnBlocks>(action).lease);
      }
    }
  }
  void OnReady(const LeaseReady& ready) {
    const Held& held = held_.at(ready.lease.lease_id);
    for (std::size_t i = 0; i < held.extents.size(); ++i) {
      const BlockExtent& extent = held.extents[i];
      EXPECT_TRUE(HoldsBlock(held.prompt_seed, i, arena_.span().subspan(extent.offset, extent.bytes)))
          << "block " << i << " of prompt " << held.prompt_seed << " is wrong";
    }
    EXPECT_EQ(ready.first_token.seed, held.prompt_seed);
    EXPECT_TRUE(admitted_.insert(held.prompt_seed).second) << "admitted twice";
    EXPECT_TRUE(table_.Admit(ready.lease).ok());
    running_.emplace(Now() + 50'000'000, ready.lease);
  }
  void OnReturn(const LeaseKey& key) {
    const auto node = held_.extract(key.lease_id);
    ASSERT_FALSE(node.empty()) << "returned twice";
    ASSERT_EQ(node.mapped().key, key);
    for (const BlockExtent& extent : node.mapped().extents) {
      const auto bytes = arena_.span().subspan(extent.offset, extent.bytes);
      std::fill(bytes.begin(), bytes.end(), kPoison);
    }
    ++n_returned_;
  }
  void ExpectPoison(const BlockExtent& extent) {
    for (const std::byte b : arena_.span().subspan(extent.offset, extent.bytes)) {
      if (b != kPoison) return ADD_FAILURE() << "a late write landed in a free block";
    }
  }

  Arena arena_;
  std::unique_ptr<BlockPool> pool_;
  LeaseTable table_;
  std::map<std::uint64_t, Held> held_;
  std::deque<VerifyLease> to_verify_;
  std::multimap<std::int64_t, LeaseKey> running_;
  std::set<std::uint64_t> admitted_;
  int n_reserved_ = 0, n_returned_ = 0, n_failed_ = 0;
  std::unique_ptr<FakeTransport> transport_;
};

class PrefillNode final : public Node, public TransportListener {
 public:
  PrefillNode(FakeNetwork& network, const Sender::Options& options, std::string name)
      : Node(network),
        options_(options),
        arena_(4 << 20),
        pool_(BlockPool::Create(arena_.span(), kSlabBytes).value()),
        transport_(network.Create(Options(name), *this).value()) {}

  void Run(DecodeNode& decode, std::uint64_t prompt_seed, LeaseKey lease, const std::string& layout,
           const std::shared_ptr<const KvFormat>& format) {
    BlockTable remote = BlockTable::Parse(AsBytes(layout)).value();
    const int n_tokens = remote.n_prompt_tokens();
    auto kv = SequenceKv::Create(*pool_, format, n_tokens, 128);
    ASSERT_TRUE(kv.ok()) << kv.status().ToString();
    const BlockTable local = BlockTable::Of(**kv, n_tokens, kModel, kPlan, remote.n_present());
    if (peer_ == PeerId::kNone || peer_failed_) {
      peer_ = transport_->Connect(decode.transport().LocalAddress(), decode.transport().LocalArena(), "decode").value();
      peer_failed_ = peer_up_ = false;
    }
    const Sender::Share share{0, 1, remote.n_blocks()};
    Job& job = jobs_[prompt_seed];
    job.kv = std::move(kv).value();
    job.extents = local.Extents();
    job.local = local;
    job.sender = std::make_unique<Sender>(options_, lease, share, std::move(remote), "decode");
    job.peer = peer_;
    if (peer_up_) Do(prompt_seed, job.sender->OnPeerUp(delivery_, Now()));
  }

  // One chunk of one layer becomes final, as the forward pass would have it.
  void Tick(std::mt19937_64& rng) {
    for (auto& [seed, job] : jobs_) {
      if (!job.sender->ended()) Do(seed, job.sender->Tick(Now()));
      if (job.stopped || rng() % 2 == 0) continue;
      Compute(seed, job);
    }
  }
  void Cancel(std::uint64_t prompt_seed) {
    const auto it = jobs_.find(prompt_seed);
    if (it != jobs_.end()) Do(prompt_seed, it->second.sender->Cancel(Cancelled("the client went away"), Now()));
  }

  void CheckAllEnded() {
    for (const auto& [seed, job] : jobs_) {
      EXPECT_TRUE(job.sender->ended()) << "prompt " << seed;
      EXPECT_EQ(job.n_ended, 1);
      EXPECT_EQ(job.n_local_done, 1);
    }
    EXPECT_EQ(pool_->usage().bytes_used, 0u);
  }
  bool all_ended() const {
    return std::all_of(jobs_.begin(), jobs_.end(), [](const auto& entry) { return entry.second.sender->ended(); });
  }
  // Prompts whose commit was acknowledged.
  std::set<std::uint64_t> acknowledged() const {
    std::set<std::uint64_t> found;
    for (const auto& [seed, job] : jobs_) {
      if (job.outcome.ok() && job.n_ended == 1) found.insert(seed);
    }
    return found;
  }

  void OnPeerUp(PeerId peer, const PeerInfo& info) override {
    if (peer != peer_) return;
    peer_up_ = true;
    delivery_ = info.delivery;
    for (auto& [seed, job] : jobs_) {
      if (job.peer == peer) Do(seed, job.sender->OnPeerUp(info.delivery, Now()));
    }
  }
  bool AcceptWrite(PeerId, const WriteTag&, std::uint64_t, std::uint64_t) override { return false; }
  void OnWriteDone(PeerId, const WriteTag&, std::uint64_t, std::uint64_t, const Status&) override {}
  Status OnMessage(PeerId peer, std::uint16_t type, std::span<const std::byte> payload) override {
    ZEROC_ASSIGN_OR_RETURN(const Message message, ParseMessage(type, payload));
    for (auto& [seed, job] : jobs_) {
      if (!(job.sender->lease() == LeaseOf(message)) || job.sender->ended()) continue;
      Do(seed, job.sender->OnMessage(message, Now()));
      return OkStatus();
    }
    if (const auto answer = AnswerWithoutSender(message)) {
      transport_->Send(peer, answer->type, AsBytes(answer->payload), [](const Status&) {});
    }
    return OkStatus();
  }
  void OnProtocolError(PeerId, const Status& status) override { ADD_FAILURE() << status.ToString(); }
  void OnPeerFailure(PeerId peer, const Status& status) override {
    if (peer == peer_) peer_failed_ = true;
    for (auto& [seed, job] : jobs_) {
      if (job.peer == peer) Do(seed, job.sender->OnPeerFailure(status, Now()));
    }
  }

 private:
  struct Job {
    std::unique_ptr<Sender> sender;
    std::unique_ptr<SequenceKv> kv;
    std::vector<BlockExtent> extents;
    BlockTable local;
    PeerId peer = PeerId::kNone;
    int layer = 0;
    int n_packed = 0, n_exact = 0;
    bool stopped = false;
    Status outcome;
    int n_local_done = 0, n_ended = 0, n_writes_open = 0;
  };

  void Fill(std::uint64_t seed, const Job& job, std::size_t block_idx) {
    FillBlock(seed, block_idx, arena_.span().subspan(job.extents[block_idx].offset, job.extents[block_idx].bytes));
  }
  void Compute(std::uint64_t seed, Job& job) {
    const BlockTable::Layer& layer = job.local.layer(job.layer);
    const int n_packed = static_cast<int>(layer.blocks.n_packed());
    const int n_exact = static_cast<int>(layer.blocks.exact.size());
    const BlockRange packed{job.n_packed, std::min(job.n_packed + 2, n_packed)};
    FinalBlocks final{job.layer, {packed}, false, job.n_exact, n_exact};
    // The tail comes with the last packed blocks, or without any block by block.
    if (packed.end < n_packed) final.exact_end = 0;
    if (n_packed == 0) final.exact_end = std::min(job.n_exact + 1, n_exact);
    const bool last = packed.end == n_packed && final.exact_end == n_exact;
    final.sink = job.n_packed == 0 && packed.end > 0;
    // The engine counts, and announces, the present blocks too.
    const int skipped = job.local.n_present();
    const auto from_first = [skipped](int index) { return index == 0 ? 0 : index + skipped; };
    const bool packs = job.kv->format().packs;
    if (packs) final.packed = {{from_first(packed.begin), packed.end + skipped}};
    if (!packs) final.exact_begin = from_first(job.n_exact);
    for (int b = packed.begin; b < packed.end; ++b) Fill(seed, job, layer.first_block + static_cast<std::size_t>(b));
    std::size_t next = layer.first_block + static_cast<std::size_t>(n_packed);
    if (layer.blocks.sink.valid()) {
      if (final.sink) Fill(seed, job, next);
      ++next;
    }
    for (int b = job.n_exact; b < final.exact_end; ++b) Fill(seed, job, next + static_cast<std::size_t>(b));
    const int n_exact_ready = final.exact_end;
    if (!packs) final.exact_end += skipped;
    if (++job.layer == kLayers) {
      job.layer = 0;
      job.n_packed = packed.end;
      job.n_exact = n_exact_ready;
      job.stopped = last;
    }
    const bool finished = job.stopped;
    auto actions = job.sender->OnBlocksReady(*job.kv, final, Now());
    ASSERT_TRUE(actions.ok()) << actions.status().ToString();
    Do(seed, std::move(actions).value());
    if (!finished) return;
    FirstToken token{11, -0.5f, {}, seed, static_cast<std::uint32_t>(job.local.n_prompt_tokens())};
    Do(seed, job.sender->OnFirstToken(token, Now()));
  }

  void Do(std::uint64_t seed, SenderActions actions) {
    Job& job = jobs_.at(seed);
    for (SenderAction& action : actions) {
      if (const auto* write = std::get_if<PostWrite>(&action)) {
        ++job.n_writes_open;
        transport_->Write(job.peer, job.sender->lease().tag(), write->local, write->remote_offset,
                          [this, seed](const Status& s) {
                            --jobs_.at(seed).n_writes_open;
                            Do(seed, jobs_.at(seed).sender->OnWriteDone(s, Now()));
                          });
      } else if (std::get_if<PostFlush>(&action) != nullptr) {
        transport_->Flush(job.peer,
                          [this, seed](const Status& s) { Do(seed, jobs_.at(seed).sender->OnFlushDone(s, Now())); });
      } else if (const auto* post = std::get_if<PostMessage>(&action)) {
        transport_->Send(job.peer, post->message.type, AsBytes(post->message.payload), [](const Status&) {});
      } else if (std::get_if<ClosePeer>(&action) != nullptr) {
        transport_->Close(job.peer,
                          [this, peer = job.peer](const Status&) { OnPeerFailure(peer, Cancelled("closed")); });
      } else if (std::get_if<LocalDone>(&action) != nullptr) {
        OnLocalDone(job);
      } else {
        job.outcome = std::get<SenderEnded>(action).status;
        ++job.n_ended;
        EXPECT_EQ(job.n_local_done, 1) << "ended before its bytes were free";
      }
    }
  }
  // The KV goes back at once; a write that still read it would carry poison.
  void OnLocalDone(Job& job) {
    ++job.n_local_done;
    EXPECT_EQ(job.n_writes_open, 0) << "a write still reads these bytes";
    job.stopped = true;
    for (const BlockExtent& extent : job.extents) {
      const auto bytes = arena_.span().subspan(extent.offset, extent.bytes);
      std::fill(bytes.begin(), bytes.end(), kPoison);
    }
    job.kv.reset();
  }

  const Sender::Options options_;
  Arena arena_;
  std::unique_ptr<BlockPool> pool_;
  std::map<std::uint64_t, Job> jobs_;
  PeerId peer_ = PeerId::kNone;
  bool peer_up_ = false, peer_failed_ = false;
  Delivery delivery_ = Delivery::kActiveMessage;
  std::unique_ptr<FakeTransport> transport_;
};

enum class Fault { kNone, kCancel, kDrop, kKillPrefill, kStallPrefill, kStallDecode, kCut };

struct Totals {
  int prompts = 0, admitted = 0, failed = 0;
};

// One run: some prompts, one kind of fault at a random moment, then time for everything to end.
void RunOnce(std::uint64_t seed, Delivery delivery, Fault fault, Totals* totals) {
  SCOPED_TRACE("seed " + std::to_string(seed) + " delivery " + std::to_string(static_cast<int>(delivery)) + " fault " +
               std::to_string(static_cast<int>(fault)));
  std::mt19937_64 rng(seed);
  FakeNetwork network(seed, delivery);
  FakeFaults faults;
  faults.delay_max_seconds = rng() % 2 == 0 ? 1e-4 : 0.05;
  if (fault == Fault::kDrop) faults.drop_probability = 0.02;
  // A put that arrives twice cannot be refused by anybody, and no network card does that.
  if (delivery == Delivery::kActiveMessage) faults.duplicate_probability = rng() % 2 == 0 ? 0 : 0.1;
  network.set_faults(faults);
  LeaseTable::Options lease_options;
  lease_options.expiry_ns = fault == Fault::kNone ? 30'000'000'000 : 2'000'000'000;
  DecodeNode decode(network, lease_options, seed);
  Sender::Options sender_options;
  sender_options.write_bytes_max = 16 << 10;
  sender_options.heartbeat_ns = 500'000'000;
  sender_options.answer_timeout_ns = 4'000'000'000;
  sender_options.stop_timeout_ns = 2'000'000'000;
  auto prefill = std::make_unique<PrefillNode>(network, sender_options, "prefill");
  std::set<std::uint64_t> acknowledged;
  const int n_prompts = 1 + static_cast<int>(rng() % 4);
  const int fault_at = static_cast<int>(rng() % 40);
  const int resume_at = fault_at + 1 + static_cast<int>(rng() % 400);
  int started = 0;
  for (int tick = 0; tick < 3000; ++tick) {
    if (started < n_prompts && rng() % 4 == 0) {
      const std::uint64_t prompt = seed * 10 + static_cast<std::uint64_t>(started++);
      const auto format = MakeFormat(rng() % 3 == 0 ? 16 : 4);
      std::string layout;
      const auto lease = decode.Reserve(prompt, format, 1 + static_cast<int>(rng() % 500), &layout);
      ASSERT_TRUE(lease.has_value());
      ++totals->prompts;
      prefill->Run(decode, prompt, *lease, layout, format);
    }
    if (tick == fault_at) {
      const std::uint64_t victim = seed * 10 + rng() % 4;
      if (fault == Fault::kCancel) prefill->Cancel(victim);
      if (fault == Fault::kStallPrefill) network.Stall("prefill");
      if (fault == Fault::kStallDecode) network.Stall("decode");
      if (fault == Fault::kCut) network.Cut("prefill", "decode");
      if (fault == Fault::kKillPrefill) {
        network.Kill("prefill");
        acknowledged.merge(prefill->acknowledged());
        prefill = std::make_unique<PrefillNode>(network, sender_options, "prefill");
      }
    }
    if (tick == resume_at) {
      network.Resume("prefill");
      network.Resume("decode");
    }
    const bool stalled = tick >= fault_at && tick < resume_at;
    if (!(stalled && fault == Fault::kStallPrefill)) prefill->Tick(rng);
    if (!(stalled && fault == Fault::kStallDecode)) decode.Tick();
    network.RunFor(0.02);
    if (started == n_prompts && tick > resume_at && prefill->all_ended() && decode.n_held() == 0) break;
  }
  prefill->CheckAllEnded();
  decode.CheckAllBack();
  acknowledged.merge(prefill->acknowledged());
  for (const std::uint64_t prompt : acknowledged) EXPECT_TRUE(decode.admitted().contains(prompt));
  totals->admitted += static_cast<int>(decode.admitted().size());
  totals->failed += decode.n_failed();
  if (fault == Fault::kNone) {
    EXPECT_EQ(static_cast<int>(decode.admitted().size()), n_prompts);
  }
}

class TwoPartyTest : public ::testing::TestWithParam<std::tuple<Delivery, Fault>> {};

TEST_P(TwoPartyTest, NothingIsLostOrMixedUp) {
  const auto [delivery, fault] = GetParam();
  Totals totals;
  for (std::uint64_t seed = 1; seed <= 250 && !HasFailure(); ++seed) RunOnce(seed, delivery, fault, &totals);
  // The faults bite, and do not bite everything.
  EXPECT_GT(totals.admitted, 0);
  if (fault == Fault::kDrop || fault == Fault::kKillPrefill) {
    EXPECT_LT(totals.admitted, totals.prompts);
  }
  RecordProperty("prompts", totals.prompts);
  RecordProperty("admitted", totals.admitted);
  std::printf("prompts %d admitted %d failed at decode %d\n", totals.prompts, totals.admitted, totals.failed);
}

std::string CaseName(const ::testing::TestParamInfo<std::tuple<Delivery, Fault>>& info) {
  static const char* const kNames[] = {"None", "Cancel", "Drop", "KillPrefill", "StallPrefill", "StallDecode", "Cut"};
  return std::string(std::get<0>(info.param) == Delivery::kPut ? "Put" : "Am") +
         kNames[static_cast<int>(std::get<1>(info.param))];
}

INSTANTIATE_TEST_SUITE_P(Faults, TwoPartyTest,
                         ::testing::Combine(::testing::Values(Delivery::kActiveMessage, Delivery::kPut),
                                            ::testing::Values(Fault::kNone, Fault::kCancel, Fault::kDrop,
                                                              Fault::kKillPrefill, Fault::kStallPrefill,
                                                              Fault::kStallDecode, Fault::kCut)),
                         CaseName);

}  // namespace
}  // namespace zeroc
