#include <algorithm>
#include <nlohmann/json.hpp>

#include "libzeroc/checkpoint/file_io.h"
#include "libzeroc/checkpoint/safetensors.h"

namespace zeroc {
namespace {

using internal::Quoted;

Status CheckTensor(const std::string& name, const TensorView& view) {
  std::size_t bytes = 0;
  if (name.empty() || name == internal::kMetadataKey) {
    return InvalidArgument("tensor name " + Quoted(name) + " is not allowed");
  }
  if (view.shape.size() > internal::kRankMax || !internal::TensorBytes(view.dtype, view.shape, &bytes) ||
      bytes != view.bytes || (bytes != 0 && view.data == nullptr)) {
    return InvalidArgument("tensor " + Quoted(name) + ": shape " + ShapeToString(view.shape) + " of " +
                           std::string(DTypeName(view.dtype)) + " does not fit its " + std::to_string(view.bytes) +
                           " bytes");
  }
  return OkStatus();
}

// Throws nlohmann::json::exception for text that is not UTF-8.
std::string HeaderText(const std::vector<const TensorMap::value_type*>& order,
                       const std::map<std::string, std::string>& metadata) {
  using nlohmann::json;
  std::string text = "{";
  if (!metadata.empty()) {
    text += json(internal::kMetadataKey).dump();
    text += ':';
    text += json(metadata).dump();
  }
  std::size_t position = 0;
  for (const auto* item : order) {
    const TensorView& view = item->second;
    const json entry = {
        {"dtype", DTypeName(view.dtype)}, {"shape", view.shape}, {"data_offsets", {position, position + view.bytes}}};
    if (text.size() > 1) text += ',';
    text += json(item->first).dump();
    text += ':';
    text += entry.dump();
    position += view.bytes;
  }
  return text + "}";
}

}  // namespace

Status WriteSafetensors(const std::string& path, const TensorMap& tensors,
                        const std::map<std::string, std::string>& metadata) {
  if (tensors.size() > internal::kTensorsMax) return InvalidArgument(path + ": too many tensors");
  std::vector<const TensorMap::value_type*> order;
  order.reserve(tensors.size());
  for (const auto& item : tensors) {
    ZEROC_RETURN_IF_ERROR(CheckTensor(item.first, item.second).WithContext(path));
    order.push_back(&item);
  }
  // Widest first keeps every tensor aligned to its element without padding.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return DTypeBytes(a->second.dtype) > DTypeBytes(b->second.dtype);
  });

  std::string text(8, '\0');
  try {
    text += HeaderText(order, metadata);
  } catch (const nlohmann::json::exception&) {
    return InvalidArgument(path + ": a tensor name or a metadata text is not UTF-8");
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts on 8 bytes, as readers expect
  const std::uint64_t length = text.size() - 8;
  if (length > internal::kHeaderBytesMax) return InvalidArgument(path + ": the header would exceed the format's limit");
  for (int i = 0; i < 8; ++i) text[i] = static_cast<char>(length >> (8 * i) & 0xff);

  std::vector<std::span<const std::byte>> parts = {std::as_bytes(std::span(text))};
  for (const auto* item : order) parts.emplace_back(item->second.data, item->second.bytes);
  return internal::WriteFileAtomically(path, parts);
}

}  // namespace zeroc
