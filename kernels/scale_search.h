// Where the search for a token's scale starts and how far it goes: shared by every kv_pack.
//
// The search takes the scale code that just covers the run's range and tries it and the codes below it: clipping the
// tails buys a finer step. The best half range of a Gaussian run is 2.5, 2.1, 1.5 and 0.8 standard deviations for 4, 3,
// 2 and 1 bits (Max 1960), and the covering one is about 2.6 for 64 coordinates, so coarse widths look further down.
#pragma once

namespace zeroc::kernels {

// Number of scale codes tried, the covering one first.
constexpr int ScaleCandidates(int bits) { return bits == 8 ? 2 : bits == 4 ? 5 : bits == 3 ? 8 : bits == 2 ? 12 : 20; }
// Coarse widths also try the mean as the centre; fine ones keep the middle of the range.
constexpr bool TriesMean(int bits) { return bits <= 3; }

}  // namespace zeroc::kernels
