// What this machine can do at most, measured in well under a second per figure, as the yardstick of `zeroc bench`.
#pragma once

#include <string>

namespace zeroc {

struct MachinePeak {
  double read_bytes_per_s = 0;  // all threads read memory far beyond the caches, each byte once
  double flops_per_s = 0;       // all threads multiply and add in registers; a multiply-add counts two
  std::string flops_kind;       // the widest instruction there is: "AMX bf16", "AVX-512 bf16", "AVX-512 f32", ..
  std::string processor;        // its name, as the system has it
};

// Best of a few short runs on n_threads threads of its own (0: one per processor of this process).
MachinePeak MeasureMachinePeak(int n_threads);

}  // namespace zeroc
