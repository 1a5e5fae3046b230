#include "services/common/grpc_server.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <future>
#include <memory>

#include "grpc/health/v1/health.grpc.pb.h"

namespace zeroc {
namespace {

using Health = grpc::health::v1::Health;

// Once an abort inside gRPC, in one of a hundred runs of the router's tests.
TEST(GrpcServerTest, AReactionMayDropTheLastChannel) {
  for (int i = 0; i < 20; ++i) {
    std::promise<grpc::StatusCode> ended;
    {
      struct Call {
        std::shared_ptr<Health::Stub> stub = Health::NewStub(MakeGrpcChannel("127.0.0.1:1", {}));
        grpc::ClientContext context;
        grpc::health::v1::HealthCheckRequest request;
        grpc::health::v1::HealthCheckResponse response;
      };
      auto call = std::make_shared<Call>();
      call->context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
      auto* const raw = call.get();
      raw->stub->async()->Check(&raw->context, &raw->request, &raw->response,
                                [call = std::move(call), &ended](const grpc::Status& status) mutable {
                                  call.reset();
                                  ended.set_value(status.error_code());
                                });
    }
    EXPECT_EQ(ended.get_future().get(), grpc::StatusCode::UNAVAILABLE);
  }
}

}  // namespace
}  // namespace zeroc
