// The router's calls to one simulated worker: the binaries' WorkerConnection over simulated calls (rpc.h). What they
// carry is checked on the way: the prompt of every attempt is the request's own and what its client has of the answer.
#pragma once

#include <memory>
#include <string>

#include "services/router/worker_connection.h"
#include "tests/simulation/rpc.h"

namespace zeroc::simulation {

class RouterNode;
class VirtualTimers;
class World;

// Of one life of the router; when it has ended, nothing new is sent and every call that is answered late is lost.
struct RouterLife {
  World& world;
  RouterNode& router;
  VirtualTimers& timers;
  bool over = false;
};

std::shared_ptr<WorkerConnection> Connect(std::shared_ptr<RouterLife> life, std::string worker);

std::string ProfileOf(int format);  // "f0", ..

}  // namespace zeroc::simulation
