// Open Inference requests from strangers: what is accepted has a text and survives its way back as an answer.
#include <string>

#include "libzeroc/base/check.h"
#include "services/router/kserve_convert.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  inference::ModelInferRequest message;
  if (!message.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto request = zeroc::ParseKserveRequest(message);
  if (!request.ok()) {
    ZEROC_CHECK(!request.status().message().empty());
    return 0;
  }
  ZEROC_CHECK(request->generate.has_text());
  const auto answer = zeroc::KserveAnswer(*request, request->generate.text(), {}, nullptr);
  ZEROC_CHECK(answer.outputs_size() == (request->want_text ? 1 : 0), answer.outputs_size());
  ZEROC_CHECK(answer.id() == message.id());
  return 0;
}
