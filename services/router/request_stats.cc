#include "services/router/request_stats.h"

#include <algorithm>
#include <cmath>

namespace zeroc {
namespace {

using Time = RequestTimes::Time;

double Between(Time from, Time to) { return std::max(0.0, std::chrono::duration<double>(to - from).count()); }

// A worker's figure, foreign: at least 0 and at most what the router's own clock leaves for it.
double Claim(double reported, double available) {
  return std::isfinite(reported) ? std::clamp(reported, 0.0, available) : 0.0;
}

}  // namespace

v1::PhaseSeconds PhasesOf(const RequestTimes& times) {
  v1::PhaseSeconds phases;
  const Time end = times.last_token.value_or(times.arrival);
  const Time reserve_begin = times.reserve_begin.value_or(end);
  phases.set_queue(Between(times.arrival, reserve_begin));
  if (!times.reserve_begin.has_value()) return phases;

  const Time reserve_end = times.reserve_end.value_or(end);
  phases.set_reserve(Between(reserve_begin, reserve_end));
  if (!times.reserve_end.has_value()) return phases;

  const double to_first = Between(reserve_end, times.first_token.value_or(end));
  const double prefill = Claim(times.prefill_seconds, to_first);
  phases.set_prefill(prefill);
  phases.set_queue(phases.queue() + to_first - prefill);
  if (!times.first_token.has_value()) return phases;

  // A stop string can end the request before decode has admitted it: then the rest is still the wire.
  const Time admitted = std::min(times.admitted.value_or(end), end);
  const double to_admitted = Between(*times.first_token, admitted);
  const double admit = times.admitted.has_value() ? Claim(times.admit_seconds, to_admitted) : 0.0;
  phases.set_admit(admit);
  phases.set_wire(to_admitted - admit);
  phases.set_decode(Between(std::max(*times.first_token, admitted), end));
  return phases;
}

double JctSeconds(const RequestTimes& times) {
  return times.last_token.has_value() ? Between(times.arrival, *times.last_token) : 0;
}

double TtftSeconds(const RequestTimes& times) {
  return times.first_token.has_value() ? Between(times.arrival, *times.first_token) : 0;
}

}  // namespace zeroc
