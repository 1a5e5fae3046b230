// The binaries' router (services/router: choice, admission queue, attempts, retries, answers) on the virtual clock, and
// its clients, who look at every token. Its connections to the workers are worker_connection.h.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "libzeroc/base/status.h"
#include "tests/simulation/world.h"

namespace zeroc::simulation {

class RouterNode {
 public:
  explicit RouterNode(World& world);
  ~RouterNode();

  void Begin(const RequestSpec& spec);
  void Cancel(std::uint64_t request);  // by the client; unknown and ended ones are fine
  // The process dies and a new one starts: clients and calls are lost, workers register with their next heartbeats.
  void Restart();

  // What the registry service hears.
  void Heartbeat(const std::string& worker);
  void StreamBroke(const std::string& worker);

  bool ended(std::uint64_t request) const { return !running_.contains(request); }
  std::size_t n_running() const { return running_.size(); }
  std::vector<std::uint64_t> Running() const;
  Status outcome(std::uint64_t request) const { return outcomes_.at(request); }  // of one that ended

  // What the connections ask for.
  const RequestSpec* spec(std::uint64_t request) const;  // null when it is over
  void AttemptLost(std::uint64_t request, const std::string& why);

 private:
  class Client;
  class Process;  // one life

  void End(std::uint64_t request, const Status& status, std::size_t n_tokens);
  void Sweep();

  World& world_;
  std::unique_ptr<Process> process_;
  std::vector<std::unique_ptr<Process>> dead_;  // calls of them may still be under way
  std::map<std::uint64_t, std::shared_ptr<Client>> running_;
  std::map<std::uint64_t, RequestSpec> specs_;  // of all: a late call may ask
  std::map<std::uint64_t, Status> outcomes_;
};

// What all tokens of a request are a function of.
std::uint64_t ContentOf(const World& world, std::uint64_t request);

}  // namespace zeroc::simulation
