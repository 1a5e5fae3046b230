// The settings of zeroc-router.
#pragma once

#include <cstdint>
#include <string>

#include "services/common/access.h"
#include "services/common/options.h"
#include "services/common/security.h"

namespace zeroc {

struct RouterOptions {
  std::string model;
  std::string plan;
  std::string served_model_name;
  std::string grpc_listen = "127.0.0.1:9000";
  std::string http_listen = "127.0.0.1:8000";
  std::string log_level = "info";

  double default_max_ppl_increase = 0.1;
  std::int64_t default_max_tokens = 256;
  std::int64_t max_in_flight = 256;
  std::int64_t request_timeout_ms = 600'000;
  std::int64_t reserve_timeout_ms = 5'000;
  std::int64_t queued_bytes_max = 1 << 20;
  std::int64_t retries_max = 2;
  std::int64_t queue_max = 128;
  std::int64_t queue_timeout_ms = 30'000;
  bool adaptive_profiles = true;
  std::int64_t local_prefill_tokens = 128;
  std::int64_t local_prefill_queue_ms = 1'000;
  std::int64_t sp_min_tokens = 2'048;
  double audit_share = 0.01;
  std::int64_t audit_window_tokens = 20'000;

  std::int64_t heartbeat_ms = 1'000;
  std::int64_t heartbeat_expiry_ms = 5'000;
  std::int64_t drain_delay_ms = 0;
  std::int64_t drain_timeout_ms = 30'000;

  std::int64_t http_body_bytes_max = 8 << 20;
  std::int64_t http_header_bytes_max = 16 << 10;
  std::int64_t http_connections_max = 1024;
  std::int64_t http_request_timeout_ms = 10'000;
  std::int64_t http_write_timeout_ms = 30'000;
  std::int64_t http_threads = 2;

  std::int64_t grpc_message_bytes_max = 32 << 20;
  std::int64_t grpc_metadata_bytes_max = 16 << 10;
  std::int64_t grpc_streams_max = 1024;

  std::int64_t max_prompt_tokens = 0;
  std::int64_t max_output_tokens = 0;

  AccessOptions access;
  SecurityOptions security;
};

// The set refers to `options`.
OptionSet RouterOptionSet(RouterOptions* options);

}  // namespace zeroc
