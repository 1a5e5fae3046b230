#include "libzeroc/model/sp_step.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "libzeroc/base/check.h"
#include "libzeroc/model/sp_wire.h"

namespace zeroc {
namespace {

// Memory side by side becomes one piece.
template <typename Byte>
void Append(std::uint8_t* data, std::int64_t n, std::vector<std::span<Byte>>* spans) {
  auto* begin = reinterpret_cast<Byte*>(data);
  const auto size = static_cast<std::size_t>(n);
  if (!spans->empty() && spans->back().data() + spans->back().size() == begin) {
    spans->back() = {spans->back().data(), spans->back().size() + size};
  } else {
    spans->push_back({begin, size});
  }
}

bool MovesHeads(SpScheme scheme) { return scheme == SpScheme::kUlysses || scheme == SpScheme::kUlysses8; }

// Query rows of one KV head, [n_tokens, group, d], of AttentionQueries::q and everything that lies like it.
std::int64_t RowAt(const AttentionShape& shape, int kv_head, int n_tokens, int token, int head_in_group) {
  return (std::int64_t{kv_head} * n_tokens + token) * shape.group() + head_in_group;
}

}  // namespace

struct SpStep::HeadExchange {
  struct Peer {
    std::vector<Rows> ours, theirs;  // our queries for its heads, its queries for ours
    std::vector<std::byte> q_out, q_in, o_out, o_in;
    CommOp outputs_in{};
  };
  int layer;
  AttentionShape shape;
  int act_bytes;
  std::vector<Peer> peers;  // [rank]
  std::vector<CommOp> queries_in, sends;
  std::int64_t query_bytes, output_bytes;  // of a row
  // Of our queries over lasting blocks, range by range as OutsideAttention.
  std::vector<std::vector<float>> out, log_sum;
};

SpStep::SpStep(Communicator& comm, const SpOptions& options, SequenceKv& kv, const SpSplit& split)
    : comm_(comm), options_(options), kv_(kv), split_(split), n_ranks_(comm.size()) {
  ZEROC_CHECK(options.scheme != SpScheme::kAuto && split.n_ranks() == n_ranks_ && kv.is_share() && kv.n_tokens() == 0 &&
                  kv.max_tokens() == split.n_tokens(),
              split.n_ranks(), n_ranks_, kv.n_tokens(), kv.max_tokens());
  const int n_lasting = CountLastingBlocks(kv.format(), split.n_tokens());
  for (int rank = 0; rank < n_ranks_; ++rank) {
    std::vector<int>& blocks = lasting_.emplace_back();
    for (const BlockRange& range : split.Blocks(rank)) {
      for (int b = range.begin; b < std::min(range.end, n_lasting); ++b) blocks.push_back(b);
    }
    to_viewer_.push_back(WindowBlocks(kv.format(), split, comm.rank(), rank));
    from_owner_.push_back(WindowBlocks(kv.format(), split, rank, comm.rank()));
  }
  blocks_in_.resize(static_cast<std::size_t>(n_ranks_));
  windows_in_.resize(static_cast<std::size_t>(n_ranks_));
}

SpStep::~SpStep() {
  if (in_step_) comm_.Abort(Cancelled("rank " + std::to_string(rank()) + " gave the step up"));
}

std::vector<TokenRange> SpStep::LogitTokens(int rank) const {
  std::vector<TokenRange> tokens = Tokens(rank);
  if (options_.all_logits) return tokens;
  for (TokenRange& range : tokens) {
    range.begin = range.end == split_.n_tokens() ? range.end - 1 : range.end;
  }
  return tokens;
}

int SpStep::CountLogits() const {
  int n = 0;
  for (const TokenRange& range : LogitTokens(rank())) n += range.size();
  return n;
}

std::uint64_t SpStep::Tag(int layer, Kind kind, int source) const {
  return std::uint64_t{options_.job} << 31 | static_cast<std::uint64_t>(layer) << 15 |
         static_cast<std::uint64_t>(kind) << 8 | static_cast<std::uint64_t>(source);
}

// --- blocks ---

template <typename Byte>
std::vector<std::span<Byte>> SpStep::LastingSpans(int layer, int owner, const std::vector<HeadShare>* heads) const {
  const KvFormat& format = kv_.format();
  const int tier = format.packs ? static_cast<int>(format.tiers.size()) - 1 : BlockForm::kExact;
  const kernels::KvBlockLayout& layout = kv_.FormLayout(layer, tier);
  std::vector<std::span<Byte>> spans;
  for (const int block_idx : lasting_[static_cast<std::size_t>(owner)]) {
    std::uint8_t* block = kv_.FormData(layer, {tier, block_idx});
    if (heads == nullptr) {
      Append(block, layout.block_bytes, &spans);
      continue;
    }
    for (const HeadShare& share : *heads) {
      Append(block + std::int64_t{share.kv_head} * layout.head_bytes, layout.head_bytes, &spans);
    }
  }
  return spans;
}

template <typename Byte>
std::vector<std::span<Byte>> SpStep::WindowSpans(int layer, int owner, int viewer) const {
  std::vector<std::span<Byte>> spans;
  const auto& forms =
      owner == rank() ? to_viewer_[static_cast<std::size_t>(viewer)] : from_owner_[static_cast<std::size_t>(owner)];
  for (const BlockForm& form : forms) {
    Append(kv_.FormData(layer, form), kv_.FormLayout(layer, form.tier).block_bytes, &spans);
  }
  const bool has_sink = kv_.SinkData(layer) != nullptr && kv_.format().PackedBlocksAt(split_.n_tokens()) > 0;
  if (owner == split_.OwnerOf(0) && has_sink) Append(kv_.SinkData(layer), kv_.format().sink.block_bytes, &spans);
  return spans;
}

// Of a collective: receives in the order of FromStep, then sends.
void SpStep::Collect(const std::vector<CommOp>& ops, std::vector<CommOp>* in) {
  for (int step = 1; step < n_ranks_; ++step) {
    (*in)[static_cast<std::size_t>(FromStep(step))] = ops[static_cast<std::size_t>(step) - 1];
  }
  sends_.insert(sends_.end(), ops.begin() + (n_ranks_ - 1), ops.end());
}

void SpStep::SendWindows(int layer) {
  std::vector<Communicator::Parts> parts(static_cast<std::size_t>(n_ranks_));
  std::vector<Communicator::Places> places(static_cast<std::size_t>(n_ranks_));
  for (int peer = 0; peer < n_ranks_; ++peer) {
    if (peer == rank()) continue;
    const auto i = static_cast<std::size_t>(peer);
    parts[i] = WindowSpans<const std::byte>(layer, rank(), peer);
    places[i] = WindowSpans<std::byte>(layer, peer, rank());
    sent_.windows += static_cast<double>(CountBytes(parts[i]));
  }
  Collect(comm_.AllToAll(Tag(layer, Kind::kWindows), std::move(parts), std::move(places)), &windows_in_);
}

void SpStep::SendBlocks(int layer) {
  const bool by_heads = MovesHeads(options_.scheme);
  const auto n = static_cast<std::size_t>(n_ranks_);
  std::vector<Communicator::Parts> parts(n);
  std::vector<Communicator::Places> places(n);
  for (int peer = 0; peer < n_ranks_; ++peer) {
    if (peer == rank()) continue;
    const auto i = static_cast<std::size_t>(peer);
    if (by_heads) parts[i] = LastingSpans<const std::byte>(layer, rank(), &heads_[i]);
    if (options_.scheme != SpScheme::kRing) {
      places[i] = LastingSpans<std::byte>(layer, peer, by_heads ? &heads_[static_cast<std::size_t>(rank())] : nullptr);
    }
    sent_.blocks += static_cast<double>(CountBytes(parts[i]));
  }
  if (by_heads) {
    return Collect(comm_.AllToAll(Tag(layer, Kind::kBlocks), std::move(parts), std::move(places)), &blocks_in_);
  }
  const Communicator::Parts ours = LastingSpans<const std::byte>(layer, rank(), nullptr);
  const auto n_bytes = static_cast<double>(CountBytes(ours));
  if (options_.scheme == SpScheme::kAllGather) {
    sent_.blocks += n_bytes * (n_ranks_ - 1);
    return Collect(comm_.AllGather(Tag(layer, Kind::kBlocks), ours, std::move(places)), &blocks_in_);
  }
  if (n_ranks_ == 1) return;
  ReceiveNext(layer, FromStep(1));
  sent_.blocks += n_bytes;
  sends_.push_back(comm_.Send((rank() + 1) % n_ranks_, Tag(layer, Kind::kBlocks, rank()), ours));
}

// With kRing, each by itself: a communicator may end no message of a group before it can end all of them, and the one
// behind this one is on its way only when everybody has handed this one on.
void SpStep::ReceiveNext(int layer, int source) {
  blocks_in_[static_cast<std::size_t>(source)] =
      comm_.Recv(FromStep(1), Tag(layer, Kind::kBlocks, source), LastingSpans<std::byte>(layer, source, nullptr));
}

void SpStep::OnLayerWritten(int layer, const AttentionShape& shape) {
  in_step_ = true;
  if (heads_.empty()) {
    for (int r = 0; r < n_ranks_; ++r) heads_.push_back(HeadsOf(r, n_ranks_, shape.n_heads, shape.n_kv_heads));
  }
  SendWindows(layer);
  SendBlocks(layer);
}

Status SpStep::WaitFor(int layer, int source) {
  const auto i = static_cast<std::size_t>(source);
  const CommOp ops[] = {windows_in_[i], blocks_in_[i]};
  ZEROC_RETURN_IF_ERROR(comm_.WaitAll(ops, Until()));
  const int next = (rank() + 1) % n_ranks_;
  if (options_.scheme != SpScheme::kRing || next == source) return OkStatus();
  ReceiveNext(layer, (source + n_ranks_ - 1) % n_ranks_);
  Communicator::Parts parts = LastingSpans<const std::byte>(layer, source, nullptr);
  sent_.blocks += static_cast<double>(CountBytes(parts));
  sends_.push_back(comm_.Send(next, Tag(layer, Kind::kBlocks, source), std::move(parts)));
  return OkStatus();
}

Status SpStep::Receive(int layer) {
  ZEROC_CHECK(!MovesHeads(options_.scheme));
  for (int step = 1; step < n_ranks_; ++step) ZEROC_RETURN_IF_ERROR(WaitFor(layer, FromStep(step)));
  return OkStatus();
}

Status SpStep::Finish() {
  const Status status = comm_.WaitAll(sends_, Until());
  sends_.clear();
  in_step_ = !status.ok();
  return status;
}

// --- attention ---

std::vector<TokenRange> SpStep::QueryTokens(int rank, bool all_rows) const {
  std::vector<TokenRange> tokens = all_rows ? Tokens(rank) : LogitTokens(rank);
  std::erase_if(tokens, [](const TokenRange& range) { return range.size() == 0; });
  return tokens;
}

Status SpStep::Attend(int layer, bool all_rows, const AttentionShape& shape, int act_bytes,
                      std::span<const AttentionQueries> queries, ThreadPool& threads, AttentionWorkspace& workspace) {
  ZEROC_CHECK(queries.size() == QueryTokens(rank(), all_rows).size(), queries.size());
  if (!MovesHeads(options_.scheme)) return AttendByOwner(layer, shape, queries, workspace);
  HeadExchange exchange{layer, shape, act_bytes, {}, {}, {}, 0, 0, {}, {}};
  exchange.query_bytes = QueryRowBytes(options_.scheme, shape.head_dim, act_bytes);
  exchange.output_bytes = OutputRowBytes(options_.scheme, shape.head_dim, act_bytes);
  for (int peer = 0; peer < n_ranks_; ++peer) {
    exchange.peers.push_back({RowsOf(rank(), all_rows, peer), RowsOf(peer, all_rows, rank()), {}, {}, {}, {}, {}});
  }
  const Status status = AttendByHeads(exchange, queries, threads, workspace);
  if (!status.ok()) comm_.Abort(status);  // until then the exchange's memory is in use
  return status;
}

Status SpStep::AttendByOwner(int layer, const AttentionShape& shape, std::span<const AttentionQueries> queries,
                             AttentionWorkspace& workspace) {
  if (!queries.empty()) workspace.Begin(layer, shape, queries);
  for (int step = 0; step < n_ranks_; ++step) {
    const int source = FromStep(step);
    if (step > 0) ZEROC_RETURN_IF_ERROR(WaitFor(layer, source));
    if (!queries.empty()) workspace.Pass(split_.Blocks(source), KeyForms::kAll);
  }
  if (!queries.empty()) workspace.End();
  return OkStatus();
}

std::vector<SpStep::Rows> SpStep::RowsOf(int rank, bool all_rows, int heads_of) const {
  std::vector<Rows> rows;
  std::int64_t n = 0;
  const std::vector<TokenRange> tokens = QueryTokens(rank, all_rows);
  for (std::size_t range = 0; range < tokens.size(); ++range) {
    for (const HeadShare& share : heads_[static_cast<std::size_t>(heads_of)]) {
      rows.push_back({range, tokens[range], share, n});
      n += rows.back().count();
    }
  }
  return rows;
}

Status SpStep::AttendByHeads(HeadExchange& x, std::span<const AttentionQueries> queries, ThreadPool& threads,
                             AttentionWorkspace& workspace) {
  const int d = x.shape.head_dim;
  const auto count = [](const std::vector<Rows>& rows) {
    return rows.empty() ? 0 : rows.back().begin + rows.back().count();
  };
  const auto bytes_of = [](std::int64_t n_rows, std::int64_t row_bytes) {
    return static_cast<std::size_t>(n_rows * row_bytes);
  };
  // Calls fn(row of the message, row of a range's [n_kv_heads, n_tokens, group]) over the threads.
  const auto for_rows = [&](const Rows& rows, const auto& fn) {
    threads.ParallelFor(static_cast<std::size_t>(rows.tokens.size()), [&](std::size_t token, int) {
      const auto t = static_cast<int>(token);
      for (int h = 0; h < rows.share.n; ++h) {
        fn(rows.begin + std::int64_t{t} * rows.share.n + h,
           RowAt(x.shape, rows.share.kv_head, rows.tokens.size(), t, rows.share.first + h));
      }
    });
  };

  // Queries out, and room for what comes back.
  std::vector<Communicator::Parts> parts(x.peers.size());
  std::vector<Communicator::Places> places(x.peers.size());
  for (int peer = 0; peer < n_ranks_; ++peer) {
    if (peer == rank()) continue;
    HeadExchange::Peer& p = x.peers[static_cast<std::size_t>(peer)];
    p.q_out.resize(bytes_of(count(p.ours), x.query_bytes));
    p.o_in.resize(bytes_of(count(p.ours), x.output_bytes));
    p.q_in.resize(bytes_of(count(p.theirs), x.query_bytes));
    p.o_out.resize(bytes_of(count(p.theirs), x.output_bytes));
    for (const Rows& rows : p.ours) {
      for_rows(rows, [&](std::int64_t at, std::int64_t row) {
        EncodeSpRow(options_.scheme, x.act_bytes, queries[rows.range_idx].q + row * d, d,
                    p.q_out.data() + at * x.query_bytes);
      });
    }
    parts[static_cast<std::size_t>(peer)] = {p.q_out};
    places[static_cast<std::size_t>(peer)] = {p.q_in};
    p.outputs_in = comm_.Recv(peer, Tag(x.layer, Kind::kOutputs), {p.o_in});
    sent_.queries += static_cast<double>(p.q_out.size());
    sent_.outputs += static_cast<double>(p.o_out.size());
  }
  x.queries_in.resize(x.peers.size());
  {
    const auto ops = comm_.AllToAll(Tag(x.layer, Kind::kQueries), std::move(parts), std::move(places));
    for (int step = 1; step < n_ranks_; ++step) {
      x.queries_in[static_cast<std::size_t>(FromStep(step))] = ops[static_cast<std::size_t>(step) - 1];
    }
    x.sends.assign(ops.begin() + (n_ranks_ - 1), ops.end());
  }

  // Windows of our own queries, while those and the blocks travel.
  for (int step = 1; step < n_ranks_; ++step) {
    ZEROC_RETURN_IF_ERROR(comm_.Wait(windows_in_[static_cast<std::size_t>(FromStep(step))], Until()));
  }
  if (!queries.empty()) {
    workspace.Begin(x.layer, x.shape, queries);
    const BlockRange all{0, split_.n_blocks()};
    workspace.Pass({&all, 1}, KeyForms::kWindow);
  }
  for (int step = 1; step < n_ranks_; ++step) {
    ZEROC_RETURN_IF_ERROR(comm_.Wait(blocks_in_[static_cast<std::size_t>(FromStep(step))], Until()));
  }

  // Lasting blocks for our heads: our own queries, then everybody's.
  for (const AttentionQueries& own : queries) {
    const auto n_rows = static_cast<std::size_t>(own.n_tokens) * static_cast<std::size_t>(x.shape.n_heads);
    x.out.emplace_back(n_rows * static_cast<std::size_t>(d));
    x.log_sum.emplace_back(n_rows, -std::numeric_limits<float>::infinity());
  }
  for (int step = 0; step < n_ranks_; ++step) {
    const int peer = FromStep(step);
    HeadExchange::Peer& p = x.peers[static_cast<std::size_t>(peer)];
    const auto n_rows = static_cast<std::size_t>(count(p.theirs));
    std::vector<float> q(n_rows * static_cast<std::size_t>(d)), out(q.size()), log_sum(n_rows);
    if (step > 0) {
      ZEROC_RETURN_IF_ERROR(comm_.Wait(x.queries_in[static_cast<std::size_t>(peer)], Until()));
    }
    for (const Rows& rows : p.theirs) {
      for_rows(rows, [&](std::int64_t at, std::int64_t row) {
        if (peer == rank()) {
          std::copy_n(queries[rows.range_idx].q + row * d, d, q.data() + at * d);
        } else {
          DecodeSpRow(options_.scheme, x.act_bytes, p.q_in.data() + at * x.query_bytes, d, q.data() + at * d);
        }
      });
    }
    AttendLasting(x, p.theirs, q.data(), out.data(), log_sum.data(), workspace);
    for (const Rows& rows : p.theirs) {
      for_rows(rows, [&](std::int64_t at, std::int64_t row) {
        if (peer == rank()) {
          std::copy_n(out.data() + at * d, d, x.out[rows.range_idx].data() + row * d);
          x.log_sum[rows.range_idx][static_cast<std::size_t>(row)] = log_sum[static_cast<std::size_t>(at)];
        } else {
          std::byte* to = p.o_out.data() + at * x.output_bytes;
          EncodeSpRow(options_.scheme, x.act_bytes, out.data() + at * d, d, to);
          std::memcpy(to + x.output_bytes - 4, &log_sum[static_cast<std::size_t>(at)], 4);
        }
      });
    }
    if (peer != rank()) x.sends.push_back(comm_.Send(peer, Tag(x.layer, Kind::kOutputs), {p.o_out}));
  }

  // Outputs of our queries from the other heads.
  std::vector<OutsideAttention> outside;
  for (int step = 1; step < n_ranks_; ++step) {
    const HeadExchange::Peer& p = x.peers[static_cast<std::size_t>(FromStep(step))];
    ZEROC_RETURN_IF_ERROR(comm_.Wait(p.outputs_in, Until()));
    for (const Rows& rows : p.ours) {
      for_rows(rows, [&](std::int64_t at, std::int64_t row) {
        const std::byte* from = p.o_in.data() + at * x.output_bytes;
        DecodeSpRow(options_.scheme, x.act_bytes, from, d, x.out[rows.range_idx].data() + row * d);
        std::memcpy(&x.log_sum[rows.range_idx][static_cast<std::size_t>(row)], from + x.output_bytes - 4, 4);
      });
    }
  }
  for (std::size_t i = 0; i < queries.size(); ++i) outside.push_back({x.out[i].data(), x.log_sum[i].data()});
  if (!queries.empty()) workspace.End(outside);
  return comm_.WaitAll(x.sends, Until());
}

// Normalised, with the logarithm of the softmax sum.
void SpStep::AttendLasting(const HeadExchange& x, std::span<const Rows> rows, const float* q, float* out,
                           float* log_sum, AttentionWorkspace& workspace) const {
  const int d = x.shape.head_dim;
  struct Tile {
    std::array<kernels::KvSegment, KvFormat::kMaxSegments> segments;
    std::int64_t begin;
    std::vector<float> row_max, row_sum;
  };
  std::vector<Tile> tiles;
  std::vector<AttentionCall> calls;
  for (const Rows& range : rows) {
    const int tile_tokens = std::max(1, kernels::kAttentionRowsMax / range.share.n);
    for (int token = 0; token < range.tokens.size(); token += tile_tokens) {
      const int n_tokens = std::min(tile_tokens, range.tokens.size() - token);
      const auto n_rows = static_cast<std::size_t>(n_tokens * range.share.n);
      Tile& tile = tiles.emplace_back();
      tile.begin = range.begin + std::int64_t{token} * range.share.n;
      tile.row_max.resize(n_rows);
      tile.row_sum.resize(n_rows);
      kernels::AttentionArgs args{};
      args.q = q + tile.begin * d;
      args.n_rows = static_cast<std::int32_t>(n_rows);
      args.group = range.share.n;
      args.head_dim = d;
      args.first_query_pos = range.tokens.begin + token;
      args.kv_head = range.share.kv_head;
      args.out = out + tile.begin * d;
      args.n_segments = 0;
      kernels::KvSegment all[KvFormat::kMaxSegments];
      const int n_all = kv_.Segments(x.layer, args.first_query_pos, args.first_query_pos + n_tokens - 1, all);
      for (int i = 0; i < n_all; ++i) {
        if (IsLasting(kv_.format(), x.layer, all[i]))
          tile.segments[static_cast<std::size_t>(args.n_segments++)] = all[i];
      }
      const std::int64_t n_keys = args.n_segments == 0 ? 0 : tile.segments[0].n_blocks;
      calls.push_back({args, n_keys * args.n_rows});
    }
  }
  for (std::size_t i = 0; i < tiles.size(); ++i) {  // they do not move any more
    calls[i].args.segments = tiles[i].segments.data();
    calls[i].args.row_max = tiles[i].row_max.data();
    calls[i].args.row_sum = tiles[i].row_sum.data();
  }
  workspace.RunCalls(x.shape, calls);
  for (const Tile& tile : tiles) {
    for (std::size_t r = 0; r < tile.row_sum.size(); ++r) {
      const std::int64_t row = tile.begin + static_cast<std::int64_t>(r);
      const float sum = tile.row_sum[r];
      if (sum == 0) {
        log_sum[row] = -std::numeric_limits<float>::infinity();
        continue;
      }
      log_sum[row] = tile.row_max[r] + std::log(sum);
      for (int i = 0; i < d; ++i) out[row * d + i] /= sum;
    }
  }
}

}  // namespace zeroc
