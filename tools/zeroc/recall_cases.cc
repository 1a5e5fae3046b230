#include "tools/zeroc/recall_cases.h"

#include "tools/zeroc/text_input.h"

namespace zeroc {

Result<std::vector<RecallCase>> LoadRecallCases(const Session& session, const Tokenizer& tokenizer,
                                                const std::string& path, int n_max) {
  ZEROC_ASSIGN_OR_RETURN(const std::vector<RecallLine> lines, ReadRecallSet(path));
  const std::int64_t max_positions = session.checkpoint().config().max_positions;
  std::vector<RecallCase> cases;
  for (const RecallLine& line : TakeEvenly(lines, n_max)) {
    const std::string where = path + ": case " + std::to_string(cases.size() + 1) + " of group '" + line.group + "'";
    RecallCase& added = cases.emplace_back();
    added.group = line.group;
    ZEROC_ASSIGN_OR_RETURN(added.prompt, tokenizer.EncodePrompt(line.prompt));
    ZEROC_ASSIGN_OR_RETURN(added.answer, tokenizer.Encode(line.answer));
    if (added.prompt.empty() || added.answer.empty())
      return InvalidArgument(where + ": prompt or answer has no tokens");
    ZEROC_RETURN_IF_ERROR(session.CheckIds(added.prompt, where));
    ZEROC_RETURN_IF_ERROR(session.CheckIds(added.answer, where));
    if (static_cast<std::int64_t>(added.prompt.size() + added.answer.size()) > max_positions) {
      return InvalidArgument(where + ": " + std::to_string(added.prompt.size()) + " + " +
                             std::to_string(added.answer.size()) + " tokens, the model has " +
                             std::to_string(max_positions) + " positions");
    }
  }
  return cases;
}

}  // namespace zeroc
