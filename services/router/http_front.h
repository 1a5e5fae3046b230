// The HTTP front: OpenAI-style completions over the router.
#pragma once

#include <vector>

#include "services/common/http_server.h"
#include "services/router/router.h"

namespace zeroc {

// POST /v1/completions, GET /v1/models, POST /tokenize, POST /detokenize. The router outlives the server.
std::vector<HttpServer::Route> ApiRoutes(Router& router);

// The errors that the HTTP server itself gives, in OpenAI's shape.
HttpResponse FormatHttpError(int status, std::string_view message);

}  // namespace zeroc
