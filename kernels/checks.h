// Shape checks that every backend runs before it touches memory: null pointers, sizes, strides, ranges, layouts.
// True means that the op may run; false that it returns kBadShape. Any thread; reads only the structs themselves.
#pragma once

#include "kernels/ops.h"
#include "kernels/visibility.h"

namespace zeroc::kernels {

bool IsGood(const EmbedArgs& args);
bool IsGood(const RmsNormArgs& args);
bool IsGood(const LayerNormArgs& args);
bool IsGood(const HeadNormArgs& args);
bool IsGood(const LinearArgs& args);
bool IsGood(const SwiGluArgs& args);
bool IsGood(const ReluArgs& args);
bool IsGood(const QueryPrepArgs& args);
bool IsGood(const KvWriteArgs& args);
bool IsGood(const KvPackArgs& args);
bool IsGood(const AttentionArgs& args);
bool IsGood(const AttentionMergeArgs& args);

// kv_pack between equal layouts.
KernelStatus CopyHeads(const KvPackArgs& args);

// True if a run of either side has 32 bits.
bool HasFloatRuns(const KvBlockLayout& layout);

// The segment's own window, cut to its blocks.
TokenSpan SegmentSpan(const KvSegment& segment);
// The same, with the ages and the causal limit of `row`. Empty spans have begin == end; neither end ever moves back
// from one row to the next.
TokenSpan RowSpan(const AttentionArgs& args, const KvSegment& segment, int row);
// What at least one row of the call sees lies in here.
TokenSpan RowsSpan(const AttentionArgs& args, const KvSegment& segment);

}  // namespace zeroc::kernels
