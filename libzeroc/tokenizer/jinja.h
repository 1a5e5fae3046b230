// The Jinja subset of chat templates: values, syntax tree, parser, interpreter. Internal to the tokenizer's library.
//
// Templates come from strangers: Parse and Run bound nesting, steps, string sizes and output, and report errors as
// Status naming the line. Nothing here does I/O.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "libzeroc/base/status.h"

namespace zeroc::jinja {

struct Value;
using List = std::vector<Value>;
using Map = std::vector<std::pair<std::string, Value>>;  // small, in order
struct Undefined {
  std::string name;
};
struct None {};

// Lists and maps are shared, as in Python; only namespaces are ever changed.
struct Value {
  std::variant<Undefined, None, bool, std::int64_t, std::string, std::shared_ptr<const List>, std::shared_ptr<Map>> v;

  bool defined() const { return !std::holds_alternative<Undefined>(v); }
  const std::string* string() const { return std::get_if<std::string>(&v); }
  const std::int64_t* integer() const { return std::get_if<std::int64_t>(&v); }
  const List* list() const;
  Map* map() const;
};

Value MakeList(List list);
Value MakeMap(Map map);

// As Python has them; letter case is changed in ASCII only.
std::string Strip(const std::string& text, const std::string& characters, bool left, bool right);
std::string Mapped(std::string text, int (*f)(int));  // every ASCII character through f
std::string Capitalized(std::string text, bool every_word);
// Code points, because Python counts and slices them; bytes that are no UTF-8 stand for themselves.
std::vector<std::string> Characters(const std::string& text);

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  enum class Kind : std::uint8_t {
    kLiteral,  // value
    kName,     // text
    kAttr,     // args[0].text
    kIndex,    // args[0][args[1]]
    kSlice,    // args[0][args[1]:args[2]], either may be null
    kCall,     // args[0](args[1..], named)
    kFilter,   // args[0] | text(args[1..], named)
    kTest,     // args[0] is text(args[1..])
    kUnary,    // text args[0]: not, -
    kBinary,   // args[0] text args[1]
    kIfElse,   // args[0] if args[1] else args[2] (may be null)
    kList,     // [args..]
    kMap,      // {args[0]: args[1], ..}
  };
  Kind kind;
  int line = 0;
  std::string text;
  Value value;
  std::vector<ExprPtr> args;
  std::vector<std::pair<std::string, ExprPtr>> named;
};

struct Node;
using Block = std::vector<Node>;

struct Node {
  enum class Kind : std::uint8_t { kText, kPrint, kIf, kFor, kSet };
  Kind kind;
  int line = 0;
  std::string text;                                 // kText; kSet: the namespace's attribute, empty for a name
  ExprPtr expr;                                     // kPrint, kFor (what to loop over), kSet
  ExprPtr condition;                                // kFor: only items for which it holds; may be null
  std::vector<std::string> names;                   // kFor, kSet
  std::vector<std::pair<ExprPtr, Block>> branches;  // kIf: in order; a null condition is else
  Block body;                                       // kFor
  Block otherwise;                                  // kFor without items
};

Result<Block> Parse(std::string_view source);
// One expression of a template; for Parse.
struct Token {
  enum class Kind : std::uint8_t { kEnd, kName, kString, kInteger, kOperator };
  Kind kind = Kind::kEnd;
  std::string text;
  int line = 0;
};
Result<std::vector<Token>> Tokenize(std::string_view code, int line);

// Globals are what the template finds under a name.
Result<std::string> Run(const Block& program, const Map& globals);

}  // namespace zeroc::jinja
