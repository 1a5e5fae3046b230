// Who may make a gRPC call of the API: the metadata `authorization` is what the header is in HTTP.
#pragma once

#include <grpcpp/grpcpp.h>

#include <string>

#include "services/common/access.h"
#include "services/common/logging.h"

namespace zeroc {

// access null: everybody may. A refusal is logged.
inline AccessControl::Decision AdmitCall(AccessControl* access, const grpc::CallbackServerContext& context) {
  if (access == nullptr) return {};
  const auto found = context.client_metadata().find("authorization");
  AccessControl::Decision decision = found == context.client_metadata().end()
                                         ? access->Admit({})
                                         : access->Admit({found->second.data(), found->second.size()});
  if (!decision.status.ok()) {
    LogWarning("refused peer=" + context.peer() + " because=\"" + std::string(decision.status.message()) + "\"");
  }
  return decision;
}

}  // namespace zeroc
