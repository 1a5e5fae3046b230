#include "services/router/router_options.h"

namespace zeroc {

OptionSet RouterOptionSet(RouterOptions* o) {
  OptionSet set("zeroc-router", "ZeroC's router: OpenAI-style HTTP and gRPC in front of prefill and decode workers.");
  set.AddString("model", &o->model, {"", "Hugging Face directory; config and tokenizer are read, not the weights."});
  set.AddString("plan", &o->plan, {"", "Plan file; empty takes zeroc.plan in the model's directory."});
  set.AddString("served_model_name", &o->served_model_name,
                {"", "What clients call the model; empty takes the directory's name."});
  set.AddString("grpc_listen", &o->grpc_listen, {"host:port", "Where gRPC listens, for clients and workers."});
  set.AddString("http_listen", &o->http_listen, {"host:port", "Where HTTP listens."});
  set.AddString("log_level", &o->log_level, {"", "debug, info, warning or error."});

  set.AddDouble("default_max_ppl_increase", &o->default_max_ppl_increase, 0, 1000,
                {"perplexity, absolute", "Perplexity budget of a request that states none."});
  set.AddInt("default_max_tokens", &o->default_max_tokens, 1, 1 << 20,
             {"tokens", "Output limit of a request that states none."});
  set.AddInt("max_in_flight", &o->max_in_flight, 1, 1 << 20, {"requests", "More are refused with 429."});
  set.AddInt("request_timeout_ms", &o->request_timeout_ms, 1, 86'400'000,
             {"ms", "A request that takes longer ends with DEADLINE_EXCEEDED."});
  set.AddInt("reserve_timeout_ms", &o->reserve_timeout_ms, 1, 600'000,
             {"ms", "How long a decode worker may take to reserve or refuse."});
  set.AddInt("retries_max", &o->retries_max, 0, 16,
             {"retries", "How often a request goes on elsewhere after a worker failed it."});
  set.AddInt("queue_max", &o->queue_max, 0, 1 << 20,
             {"requests", "So many wait for room while all decode workers are full; more are refused with 429."});
  set.AddInt("queue_timeout_ms", &o->queue_timeout_ms, 1, 3'600'000,
             {"ms", "How long a request waits for room before it is refused with 429."});
  set.AddBool("adaptive_profiles", &o->adaptive_profiles,
              {"", "Choose profiles by the measured links and workers; false: the fewest bytes within the budget."});
  set.AddInt("local_prefill_tokens", &o->local_prefill_tokens, 0, 1 << 20,
             {"tokens", "Prompts of at most so many are prefilled on the decode worker; 0: none."});
  set.AddInt("local_prefill_queue_ms", &o->local_prefill_queue_ms, 0, 3'600'000,
             {"ms", "Prompts up to 16 times as long too, when they would wait longer than this for prefill."});
  set.AddInt("sp_min_tokens", &o->sp_min_tokens, 0, 1 << 30,
             {"tokens", "Prompts of at least so many may be computed by all ranks of a prefill group; 0: none."});
  set.AddDouble("audit_share", &o->audit_share, 0, 1,
                {"ratio", "Share of the finished requests that is scored again with exact KV; 0: none."});
  set.AddInt("audit_window_tokens", &o->audit_window_tokens, 500, 1 << 30,
             {"tokens", "So many audited tokens of a profile, the last ones, make its measured increase."});
  set.AddInt("queued_bytes_max", &o->queued_bytes_max, 1 << 10, 1 << 30,
             {"bytes", "A streaming client that is further behind is cut off."});

  set.AddInt("heartbeat_ms", &o->heartbeat_ms, 10, 60'000, {"ms", "How often workers report."});
  set.AddInt("heartbeat_expiry_ms", &o->heartbeat_expiry_ms, 20, 600'000,
             {"ms", "A worker that is silent for this long is lost."});
  set.AddInt("drain_delay_ms", &o->drain_delay_ms, 0, 600'000,
             {"ms", "After SIGTERM: how long new requests are still taken while load balancers learn of it."});
  set.AddInt("drain_timeout_ms", &o->drain_timeout_ms, 0, 3'600'000,
             {"ms", "After SIGTERM: how long running requests may go on."});

  set.AddInt("http_body_bytes_max", &o->http_body_bytes_max, 1 << 10, 1 << 30, {"bytes", "Larger bodies are 413."});
  set.AddInt("http_header_bytes_max", &o->http_header_bytes_max, 1 << 10, 1 << 20,
             {"bytes", "Larger headers are 431."});
  set.AddInt("http_connections_max", &o->http_connections_max, 1, 1 << 20,
             {"connections", "More are refused with 503."});
  set.AddInt("http_request_timeout_ms", &o->http_request_timeout_ms, 1, 600'000,
             {"ms", "How long a client may take to send a request."});
  set.AddInt("http_write_timeout_ms", &o->http_write_timeout_ms, 1, 600'000,
             {"ms", "A client that reads nothing for this long is gone."});
  set.AddInt("http_threads", &o->http_threads, 1, 64, {"threads", "Threads of the HTTP server."});

  set.AddInt("grpc_message_bytes_max", &o->grpc_message_bytes_max, 1 << 10, 1 << 30,
             {"bytes", "Larger gRPC messages are refused."});
  set.AddInt("grpc_metadata_bytes_max", &o->grpc_metadata_bytes_max, 1 << 10, 1 << 20,
             {"bytes", "Calls with more gRPC metadata are refused."});
  set.AddInt("grpc_streams_max", &o->grpc_streams_max, 1, 1 << 20,
             {"calls", "Calls of one gRPC connection at a time; more wait at the client."});
  set.AddInt("max_prompt_tokens", &o->max_prompt_tokens, 0, 1 << 30,
             {"tokens", "Longer prompts are refused; 0: up to the model's positions."});
  set.AddInt("max_output_tokens", &o->max_output_tokens, 0, 1 << 30,
             {"tokens", "Requests for more output are refused; 0: up to the model's positions."});

  set.AddString(
      "api_keys_file", &o->access.keys_file,
      {"", "A name and a bearer key a line; all but probes and metrics needs one. Empty: open to everybody."});
  set.AddDouble("requests_per_minute", &o->access.requests_per_minute, 0, 1e9,
                {"requests/minute", "Limit of each key (without keys: of all clients together); 0: none."});
  set.AddInt("max_in_flight_per_key", &o->access.in_flight_max, 0, 1 << 20,
             {"requests", "Limit of each key (without keys: of all clients together); 0: none."});
  AddSecurityOptions(&set, &o->security);
  return set;
}

}  // namespace zeroc
