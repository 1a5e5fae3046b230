#include "tests/simulation/rpc.h"

#include <algorithm>
#include <utility>

namespace zeroc::simulation {

void Call::Start(std::function<void()> serve) {
  network_.At(delay_(), worker_, [self = shared_from_this(), serve = std::move(serve)] {
    if (!self->served_) serve();
  });
}

void Call::ForgetRouter() {
  on_event = nullptr;
  on_done = nullptr;
}

void Call::ForgetAll() {
  ForgetRouter();
  on_cancel = nullptr;
}

// Reaches the worker even where it overtakes the request itself, which is then never served.
void Call::Cancel() {
  if (std::exchange(over_, true)) return;
  ForgetRouter();
  network_.At(delay_(), worker_, [self = shared_from_this()] {
    if (std::exchange(self->served_, true)) return;
    if (const auto handler = std::move(self->on_cancel)) handler();
  });
}

void Call::Break(const Status& why) {
  if (over_) return;
  const auto done = std::move(on_done);
  Cancel();
  if (done) done(why);
}

void Call::Later(std::function<void()> at_router) {
  last_arrival_ = std::max(last_arrival_, network_.now_seconds() + delay_());
  network_.At(last_arrival_ - network_.now_seconds(), {}, std::move(at_router));
}

void Call::Send(RpcEvent event) {
  if (served_) return;
  Later([self = shared_from_this(), event = std::move(event)] {
    if (self->over_ || !self->on_event) return;
    const auto handler = self->on_event;  // outlives a Cancel from inside it
    handler(event);
  });
}

void Call::End(const Status& status) {
  if (std::exchange(served_, true)) return;
  on_cancel = nullptr;
  Later([self = shared_from_this(), status] {
    if (std::exchange(self->over_, true)) return;
    const auto done = std::move(self->on_done);
    self->ForgetRouter();
    if (done) done(status);
  });
}

}  // namespace zeroc::simulation
