// Where one request's time went: from the moments the router saw and the durations the workers report to the parts of
// the job completion time. Pure.
#pragma once

#include <chrono>
#include <optional>

#include "zeroc/v1/inference.pb.h"

namespace zeroc {

struct RequestTimes {
  using Time = std::chrono::steady_clock::time_point;

  Time arrival;
  std::optional<Time> reserve_begin;
  std::optional<Time> reserve_end;
  std::optional<Time> first_token;
  std::optional<Time> admitted;
  std::optional<Time> last_token;  // or the end of a request that failed
  double prefill_seconds = 0;      // as the prefill worker says; cut to what the router's clock allows
  double admit_seconds = 0;        // as the decode worker says; likewise
};

// Stacked without overlap: the parts add up to JctSeconds exactly, whatever the workers report. Time that no part
// claims (tokenising, waiting at prefill, RPC) is queue. A request that failed early has only the parts that it
// reached.
v1::PhaseSeconds PhasesOf(const RequestTimes& times);

// Arrival to the last token; 0 while there is none.
double JctSeconds(const RequestTimes& times);
double TtftSeconds(const RequestTimes& times);

}  // namespace zeroc
