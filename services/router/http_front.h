// The HTTP front: the OpenAI-style API over the router.
#pragma once

#include <cstdint>
#include <vector>

#include "services/common/access.h"
#include "services/common/http_server.h"
#include "services/router/router.h"

namespace zeroc {

struct ApiOptions {
  std::uint32_t default_max_tokens = 256;  // of a scored prompt that states none
  std::size_t parallel_choices_max = 16;   // of one HTTP request, computed at the same time; more wait their turn
};

// /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /tokenizer_info, /health, /ping, /load,
// /version. The router outlives the server.
std::vector<HttpServer::Route> ApiRoutes(Router& router, const ApiOptions& options = {});

// Asks for an API key and counts requests, for every path but the probes and /metrics. `access` outlives the server.
HttpServer::Screener ApiScreener(AccessControl& access);

// The errors that the HTTP server itself gives, in OpenAI's shape.
HttpResponse FormatHttpError(int status, std::string_view message);

}  // namespace zeroc
