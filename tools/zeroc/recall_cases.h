// Recall sets as token ids: prompts as a model expects them (BOS in front), answers without anything added.
#pragma once

#include <string>
#include <vector>

#include "libzeroc/engine/scoring.h"
#include "tools/zeroc/session.h"

namespace zeroc {

// At most n_max cases of the file, evenly over its groups (0: all). Errors of ReadRecallSet, and kInvalidArgument for a
// case that the model has no room or no tokens for, naming its place in the list.
Result<std::vector<RecallCase>> LoadRecallCases(const Session& session, const Tokenizer& tokenizer,
                                                const std::string& path, int n_max);

}  // namespace zeroc
