// The interpreter of the Jinja subset.
#include <algorithm>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>

#include "libzeroc/tokenizer/jinja.h"

namespace zeroc::jinja {

namespace {

constexpr std::int64_t kWorkMax = 20'000'000;  // steps, and bytes of the strings and lists that are made
constexpr std::int64_t kListMax = 1 << 20;

// Thrown inside this file only; Run turns it into a Status.
struct Failure {
  std::string why;
  int line = 0;
};

bool Truthy(const Value& value) {
  if (const auto* b = std::get_if<bool>(&value.v)) return *b;
  if (value.integer() != nullptr) return *value.integer() != 0;
  if (value.string() != nullptr) return !value.string()->empty();
  if (value.list() != nullptr) return !value.list()->empty();
  if (value.map() != nullptr) return !value.map()->empty();
  return false;
}

bool Equal(const Value& a, const Value& b) {
  if (a.string() != nullptr && b.string() != nullptr) return *a.string() == *b.string();
  if (a.integer() != nullptr && b.integer() != nullptr) return *a.integer() == *b.integer();
  const auto *x = std::get_if<bool>(&a.v), *y = std::get_if<bool>(&b.v);
  if (x != nullptr && y != nullptr) return *x == *y;
  if (x != nullptr && b.integer() != nullptr) return *b.integer() == (*x ? 1 : 0);
  if (y != nullptr && a.integer() != nullptr) return *a.integer() == (*y ? 1 : 0);
  if (a.list() != nullptr && b.list() != nullptr) {
    return std::equal(a.list()->begin(), a.list()->end(), b.list()->begin(), b.list()->end(), Equal);
  }
  if (a.map() != nullptr && b.map() != nullptr) return a.map() == b.map();
  return a.v.index() == b.v.index() && !a.map() && !a.list();
}

const Value* Find(const Map& map, std::string_view key) {
  const auto found = std::find_if(map.begin(), map.end(), [key](const auto& entry) { return entry.first == key; });
  return found == map.end() ? nullptr : &found->second;
}

Value Text(std::string text) { return {std::move(text)}; }
Value Bool(bool value) { return {value}; }
Value Int(std::size_t value) { return {static_cast<std::int64_t>(value)}; }

class Interpreter {
 public:
  explicit Interpreter(const Map& globals) : globals_(globals) { scopes_.emplace_back(); }
  // A namespace may hold itself.
  ~Interpreter() {
    for (const auto& held : namespaces_) held->clear();
  }

  void Execute(const Block& block) {
    for (const Node& node : block) Execute(node);
  }
  std::string TakeOutput() { return std::move(output_); }

 private:
  using Arguments = std::vector<Value>;

  [[noreturn]] void Fail(const std::string& why) const { throw Failure{why, line_}; }
  void Charge(std::size_t work) {
    work_ += static_cast<std::int64_t>(std::min<std::size_t>(work, kWorkMax)) + 1;
    if (work_ > kWorkMax) Fail("the template takes too many steps or makes too much text");
  }

  // --- statements ---

  void Execute(const Node& node) {
    line_ = node.line;
    Charge(0);
    switch (node.kind) {
      case Node::Kind::kText:
        return Print(node.text);
      case Node::Kind::kPrint:
        return Print(ToText(Evaluate(*node.expr)));
      case Node::Kind::kSet:
        return Set(node);
      case Node::Kind::kFor:
        return For(node);
      case Node::Kind::kIf:
        for (const auto& [condition, body] : node.branches) {
          if (condition == nullptr || Truthy(Evaluate(*condition))) return Execute(body);
        }
        return;
    }
  }

  void Print(const std::string& text) {
    Charge(text.size());
    output_ += text;
  }

  void Set(const Node& node) {
    Value value = Evaluate(*node.expr);
    const std::string& name = node.names[0];
    if (node.text.empty()) {
      scopes_.back()[name] = std::move(value);
      return;
    }
    Map* map = Lookup(name).map();
    if (map == nullptr) Fail(name + " is no namespace");
    for (auto& [key, held] : *map) {
      if (key != node.text) continue;
      held = std::move(value);
      return;
    }
    map->emplace_back(node.text, std::move(value));
  }

  void Bind(const Node& node, const Value& item) {
    if (node.names.size() == 1) {
      scopes_.back()[node.names[0]] = item;
      return;
    }
    if (item.list() == nullptr || item.list()->size() != node.names.size()) Fail("an item cannot be unpacked");
    for (std::size_t i = 0; i < node.names.size(); ++i) scopes_.back()[node.names[i]] = (*item.list())[i];
  }

  void For(const Node& node) {
    const Value over = Evaluate(*node.expr);
    List items = Items(over);
    scopes_.emplace_back();
    if (node.condition != nullptr) {
      List kept;
      for (const Value& item : items) {
        Bind(node, item);
        if (Truthy(Evaluate(*node.condition))) kept.push_back(item);
      }
      items = std::move(kept);
    }
    for (std::size_t i = 0; i < items.size(); ++i) {
      scopes_.back().clear();
      Bind(node, items[i]);
      Map loop = {{"index", Int(i + 1)},
                  {"index0", Int(i)},
                  {"revindex", Int(items.size() - i)},
                  {"revindex0", Int(items.size() - i - 1)},
                  {"first", Bool(i == 0)},
                  {"last", Bool(i + 1 == items.size())},
                  {"length", Int(items.size())}};
      if (i > 0) loop.emplace_back("previtem", items[i - 1]);
      if (i + 1 < items.size()) loop.emplace_back("nextitem", items[i + 1]);
      scopes_.back()["loop"] = MakeMap(std::move(loop));
      Charge(items.size() < 8 ? 1 : 8);
      Execute(node.body);
    }
    scopes_.pop_back();
    if (items.empty()) Execute(node.otherwise);
  }

  List Items(const Value& value) {
    List items;
    if (value.list() != nullptr) items = *value.list();
    if (value.map() != nullptr) {
      for (const auto& entry : *value.map()) items.push_back(Text(entry.first));
    } else if (value.string() != nullptr) {
      for (std::string& c : Characters(*value.string())) items.push_back(Text(std::move(c)));
    } else if (value.list() == nullptr) {
      Fail("it is no list that could be looped over" + Hint(value));
    }
    Charge(items.size());
    return items;
  }

  // --- expressions ---

  static std::string Hint(const Value& value) {
    const auto* undefined = std::get_if<Undefined>(&value.v);
    return undefined == nullptr ? "" : " ('" + undefined->name + "' is undefined)";
  }

  Value Lookup(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    if (const Value* found = Find(globals_, name)) return *found;
    return {Undefined{name}};
  }

  Value Evaluate(const Expr& expr) {
    line_ = expr.line;
    Charge(0);
    switch (expr.kind) {
      case Expr::Kind::kLiteral:
        return expr.value;
      case Expr::Kind::kName:
        return Lookup(expr.text);
      case Expr::Kind::kAttr:
        return Attribute(Evaluate(*expr.args[0]), expr.text);
      case Expr::Kind::kIndex:
        return Index(Evaluate(*expr.args[0]), Evaluate(*expr.args[1]));
      case Expr::Kind::kSlice:
        return Slice(expr);
      case Expr::Kind::kCall:
        return Call(expr);
      case Expr::Kind::kFilter:
        return Filter(expr.text, Evaluate(*expr.args[0]), EvaluateRest(expr), Named(expr));
      case Expr::Kind::kTest:
        return Bool(Test(expr.text, Evaluate(*expr.args[0]), EvaluateRest(expr)));
      case Expr::Kind::kUnary:
        return Unary(expr);
      case Expr::Kind::kBinary:
        return Binary(expr);
      case Expr::Kind::kIfElse:
        if (Truthy(Evaluate(*expr.args[1]))) return Evaluate(*expr.args[0]);
        return expr.args[2] == nullptr ? Value{Undefined{"the inline if"}} : Evaluate(*expr.args[2]);
      case Expr::Kind::kList: {
        List list;
        for (const ExprPtr& item : expr.args) list.push_back(Evaluate(*item));
        return MakeList(std::move(list));
      }
      case Expr::Kind::kMap: {
        Map map;
        for (std::size_t i = 0; i + 1 < expr.args.size(); i += 2) {
          const Value key = Evaluate(*expr.args[i]);
          if (key.string() == nullptr) Fail("a key is no string");
          map.emplace_back(*key.string(), Evaluate(*expr.args[i + 1]));
        }
        return MakeMap(std::move(map));
      }
    }
    Fail("an expression is not known");
  }

  Arguments EvaluateRest(const Expr& expr) {
    Arguments rest;
    for (std::size_t i = 1; i < expr.args.size(); ++i) rest.push_back(Evaluate(*expr.args[i]));
    return rest;
  }
  Map Named(const Expr& expr) {
    Map named;
    for (const auto& [name, argument] : expr.named) named.emplace_back(name, Evaluate(*argument));
    return named;
  }

  Value Attribute(const Value& object, const std::string& name) const {
    if (object.map() != nullptr) {
      if (const Value* found = Find(*object.map(), name)) return *found;
    }
    if (!object.defined()) Fail("'." + name + "' of what is undefined" + Hint(object));
    return {Undefined{name}};
  }

  Value Index(const Value& object, const Value& key) {
    if (key.string() != nullptr) return Attribute(object, *key.string());
    if (key.integer() == nullptr) Fail("an index is neither a number nor a string");
    if (!object.defined()) Fail("an item of what is undefined" + Hint(object));
    const List items = Items(object);
    const std::int64_t size = static_cast<std::int64_t>(items.size());
    const std::int64_t at = *key.integer() < 0 ? *key.integer() + size : *key.integer();
    return at >= 0 && at < size ? items[static_cast<std::size_t>(at)] : Value{Undefined{"item"}};
  }

  Value Slice(const Expr& expr) {
    const Value object = Evaluate(*expr.args[0]);
    const List items = Items(object);
    const auto size = static_cast<std::int64_t>(items.size());
    const auto bound = [&](const ExprPtr& at, std::int64_t otherwise) {
      if (at == nullptr) return otherwise;
      const Value value = Evaluate(*at);
      if (value.integer() == nullptr) Fail("a slice's bound is no number");
      const std::int64_t index = *value.integer();
      return std::clamp<std::int64_t>(index < 0 ? index + size : index, 0, size);
    };
    const std::int64_t begin = bound(expr.args[1], 0), end = std::max(bound(expr.args[2], size), begin);
    if (object.string() == nullptr) return MakeList({items.begin() + begin, items.begin() + end});
    std::string text;
    for (std::int64_t i = begin; i < end; ++i) text += *items[static_cast<std::size_t>(i)].string();
    return Text(std::move(text));
  }

  Value Unary(const Expr& expr) {
    const Value value = Evaluate(*expr.args[0]);
    if (expr.text == "not") return Bool(!Truthy(value));
    if (value.integer() == nullptr) Fail("'-' of what is no number");
    return {-*value.integer()};
  }

  Value Binary(const Expr& expr) {
    const std::string& op = expr.text;
    Value left = Evaluate(*expr.args[0]);
    if (op == "and") return Truthy(left) ? Evaluate(*expr.args[1]) : left;
    if (op == "or") return Truthy(left) ? left : Evaluate(*expr.args[1]);
    const Value right = Evaluate(*expr.args[1]);
    line_ = expr.line;
    if (op == "==") return Bool(Equal(left, right));
    if (op == "!=") return Bool(!Equal(left, right));
    if (op == "in") return Bool(Contains(right, left));
    if (op == "~") return Text(Joined(ToText(left), ToText(right)));
    if (op == "+" && left.string() != nullptr && right.string() != nullptr) {
      return Text(Joined(*left.string(), *right.string()));
    }
    if (op == "+" && left.list() != nullptr && right.list() != nullptr) {
      List both = *left.list();
      both.insert(both.end(), right.list()->begin(), right.list()->end());
      Charge(both.size());
      return MakeList(std::move(both));
    }
    if (left.string() != nullptr && right.string() != nullptr)
      return Bool(Compare(op, *left.string(), *right.string()));
    if (left.integer() != nullptr && right.integer() != nullptr)
      return Arithmetic(op, *left.integer(), *right.integer());
    Fail("'" + op + "' does not take these values" + Hint(left) + Hint(right));
  }

  template <typename T>
  bool Compare(const std::string& op, const T& a, const T& b) const {
    if (op == "<") return a < b;
    if (op == ">") return b < a;
    if (op == "<=") return !(b < a);
    if (op == ">=") return !(a < b);
    Fail("'" + op + "' does not take these values");
  }

  // Numbers stay small: they count messages and characters.
  Value Arithmetic(const std::string& op, std::int64_t a, std::int64_t b) const {
    constexpr std::int64_t kMax = 1'000'000'000;
    if (op == "<" || op == ">" || op == "<=" || op == ">=") return Bool(Compare(op, a, b));
    if (std::abs(a) > kMax || std::abs(b) > kMax) Fail("a number is too large");
    if (op == "+") return {a + b};
    if (op == "-") return {a - b};
    if (op == "*") return {a * b};
    if (op == "/") Fail("'/' is not supported");
    if (b == 0) Fail("a division by 0");
    const std::int64_t remainder = ((a % b) + b) % b;  // as in Python: the divisor's sign
    return {op == "%" ? remainder : (a - remainder) / b};
  }

  std::string Joined(const std::string& a, const std::string& b) {
    Charge(a.size() + b.size());
    return a + b;
  }

  bool Contains(const Value& container, const Value& item) {
    if (container.string() != nullptr && item.string() != nullptr) {
      return container.string()->find(*item.string()) != std::string::npos;
    }
    if (container.map() != nullptr)
      return item.string() != nullptr && Find(*container.map(), *item.string()) != nullptr;
    if (container.list() == nullptr) Fail("'in' needs a string, a list or a map" + Hint(container));
    Charge(container.list()->size());
    return std::any_of(container.list()->begin(), container.list()->end(),
                       [&](const Value& held) { return Equal(held, item); });
  }

  std::string ToText(const Value& value) const {
    if (value.string() != nullptr) return *value.string();
    if (value.integer() != nullptr) return std::to_string(*value.integer());
    if (const auto* b = std::get_if<bool>(&value.v)) return *b ? "True" : "False";
    if (std::holds_alternative<None>(value.v)) return "None";
    if (!value.defined()) return "";
    Fail("a list or map cannot be written as text (use tojson)");
  }

  // --- what can be called ---

  Value Call(const Expr& expr) {
    const Expr& callee = *expr.args[0];
    if (callee.kind == Expr::Kind::kAttr) {
      const Value object = Evaluate(*callee.args[0]);
      return Method(object, callee.text, EvaluateRest(expr));
    }
    if (callee.kind != Expr::Kind::kName) Fail("this cannot be called");
    const Arguments arguments = EvaluateRest(expr);
    line_ = expr.line;
    const std::string& name = callee.text;
    if (name == "raise_exception") throw Failure{arguments.empty() ? "refused" : ToText(arguments[0]), 0};
    if (name == "namespace" || name == "dict") {
      namespaces_.push_back(std::make_shared<Map>(Named(expr)));
      return {namespaces_.back()};
    }
    if (name == "range") return Range(arguments);
    Fail("the function '" + name + "' is not supported");
  }

  Value Range(const Arguments& arguments) {
    std::int64_t bounds[2] = {0, 0};
    if (arguments.empty() || arguments.size() > 2) Fail("range takes one or two numbers");
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].integer() == nullptr) Fail("range takes one or two numbers");
      bounds[arguments.size() == 1 ? 1 : i] = *arguments[i].integer();
    }
    List list;
    if (bounds[1] - bounds[0] > kListMax) Fail("a range is too long");
    for (std::int64_t i = bounds[0]; i < bounds[1]; ++i) list.push_back({i});
    Charge(list.size());
    return MakeList(std::move(list));
  }

  const std::string& StringArgument(const Arguments& arguments, std::size_t at) const {
    if (at >= arguments.size() || arguments[at].string() == nullptr) Fail("a string argument is expected");
    return *arguments[at].string();
  }

  Value Method(const Value& object, const std::string& name, const Arguments& arguments) {
    if (object.map() != nullptr) {
      if (name == "get") {
        const Value* found = Find(*object.map(), StringArgument(arguments, 0));
        if (found != nullptr) return *found;
        return arguments.size() > 1 ? arguments[1] : Value{None{}};
      }
      if (name == "items" || name == "keys" || name == "values") return Entries(*object.map(), name);
    }
    const std::string* text = object.string();
    if (text == nullptr) Fail("the method '" + name + "' is not supported here" + Hint(object));
    Charge(text->size());
    static const std::string kSpace = " \t\r\n\v\f";
    const std::string& characters = arguments.empty() ? kSpace : StringArgument(arguments, 0);
    if (name == "strip") return Text(Strip(*text, characters, true, true));
    if (name == "lstrip") return Text(Strip(*text, characters, true, false));
    if (name == "rstrip") return Text(Strip(*text, characters, false, true));
    if (name == "startswith") return Bool(text->starts_with(StringArgument(arguments, 0)));
    if (name == "endswith") return Bool(text->ends_with(StringArgument(arguments, 0)));
    if (name == "split") return Split(*text, arguments);
    if (name == "upper" || name == "lower" || name == "title" || name == "capitalize")
      return Filter(name, object, {}, {});
    if (name == "replace") return Replace(*text, StringArgument(arguments, 0), StringArgument(arguments, 1));
    Fail("the method '" + name + "' is not supported");
  }

  static Value Entries(const Map& map, const std::string& name) {
    List list;
    for (const auto& [key, value] : map) {
      if (name == "keys") list.push_back(Text(key));
      if (name == "values") list.push_back(value);
      if (name == "items") list.push_back(MakeList({Text(key), value}));
    }
    return MakeList(std::move(list));
  }

  Value Split(const std::string& text, const Arguments& arguments) {
    const std::string& separator = StringArgument(arguments, 0);
    if (separator.empty()) Fail("split by an empty string");
    List parts;
    std::size_t at = 0;
    for (std::size_t found = 0; (found = text.find(separator, at)) != std::string::npos;
         at = found + separator.size()) {
      parts.push_back(Text(text.substr(at, found - at)));
    }
    parts.push_back(Text(text.substr(at)));
    Charge(8 * parts.size());
    return MakeList(std::move(parts));
  }

  Value Replace(const std::string& text, const std::string& from, const std::string& to) {
    if (from.empty()) Fail("replace of an empty string");
    std::string out;
    std::size_t at = 0;
    for (std::size_t found = 0; (found = text.find(from, at)) != std::string::npos; at = found + from.size()) {
      Charge(to.size());
      out += text.substr(at, found - at) + to;
    }
    return Text(out + text.substr(at));
  }

  Value Filter(const std::string& name, const Value& value, const Arguments& arguments, const Map& named) {
    if (name == "default" || name == "d") {
      const bool take = value.defined() && (arguments.size() < 2 || Truthy(value));
      if (!take && arguments.empty()) return Text("");
      return take ? value : arguments[0];
    }
    if (name == "tojson") return Text(ToJson(value, named));
    if (name == "trim") return Text(Strip(ToText(value), " \t\r\n\v\f", true, true));
    if (name == "upper") return Text(Mapped(ToText(value), std::toupper));
    if (name == "lower") return Text(Mapped(ToText(value), std::tolower));
    if (name == "capitalize" || name == "title") return Text(Capitalized(ToText(value), name == "title"));
    if (name == "string") return Text(ToText(value));
    if (name == "int" && value.integer() != nullptr) return value;
    if (name == "safe" || name == "e") return value;
    if (name == "replace") return Replace(ToText(value), StringArgument(arguments, 0), StringArgument(arguments, 1));
    if (name == "items" && value.map() != nullptr) return Entries(*value.map(), name);
    static constexpr std::string_view kOfLists[] = {"length", "count", "list", "first", "last", "reverse", "join"};
    if (std::find(std::begin(kOfLists), std::end(kOfLists), name) != std::end(kOfLists)) {
      return ListFilter(name, value, arguments);
    }
    Fail("the filter '" + name + "' is not supported");
  }

  Value ListFilter(const std::string& name, const Value& value, const Arguments& arguments) {
    List items = Items(value);
    if (name == "length" || name == "count") return Int(items.size());
    if (name == "first") return items.empty() ? Value{Undefined{"first"}} : items.front();
    if (name == "last") return items.empty() ? Value{Undefined{"last"}} : items.back();
    if (name == "reverse") std::reverse(items.begin(), items.end());
    if (name != "join") return MakeList(std::move(items));
    const std::string separator = arguments.empty() ? "" : StringArgument(arguments, 0);
    std::string text;
    for (std::size_t i = 0; i < items.size(); ++i) {
      Charge(separator.size());
      text += (i > 0 ? separator : "") + ToText(items[i]);
    }
    Charge(text.size());
    return Text(std::move(text));
  }

  // As Hugging Face's tojson: Python's separators, no escapes of other characters than JSON's.
  std::string ToJson(const Value& value, const Map& named) {
    if (!named.empty()) Fail("tojson with options is not supported");
    if (value.string() != nullptr) {
      Charge(value.string()->size());
      return nlohmann::json(*value.string()).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    }
    if (value.integer() != nullptr) return std::to_string(*value.integer());
    if (const auto* b = std::get_if<bool>(&value.v)) return *b ? "true" : "false";
    if (std::holds_alternative<None>(value.v)) return "null";
    if (!value.defined()) Fail("tojson of what is undefined" + Hint(value));
    if (++json_depth_ > 32) Fail("a value is nested too deeply");
    std::string text;
    if (value.list() != nullptr) {
      for (const Value& item : *value.list()) text += (text.empty() ? "" : ", ") + ToJson(item, {});
      text = "[" + text + "]";
    } else {
      for (const auto& [key, item] : *value.map()) {
        text += (text.empty() ? "" : ", ") + ToJson(Text(key), {}) + ": " + ToJson(item, {});
      }
      text = "{" + text + "}";
    }
    --json_depth_;
    Charge(text.size());
    return text;
  }

  bool Test(const std::string& name, const Value& value, const Arguments& arguments) {
    if (name == "defined") return value.defined();
    if (name == "undefined") return !value.defined();
    if (name == "none") return std::holds_alternative<None>(value.v);
    if (name == "string") return value.string() != nullptr;
    if (name == "mapping") return value.map() != nullptr;
    if (name == "iterable" || name == "sequence") {
      return value.list() != nullptr || value.string() != nullptr || value.map() != nullptr;
    }
    if (name == "number" || name == "integer") return value.integer() != nullptr;
    const auto* b = std::get_if<bool>(&value.v);
    if (name == "boolean") return b != nullptr;
    if (name == "true" || name == "false") return b != nullptr && *b == (name == "true");
    if ((name == "odd" || name == "even") && value.integer() != nullptr) {
      return (*value.integer() % 2 != 0) == (name == "odd");
    }
    if ((name == "equalto" || name == "eq") && arguments.size() == 1) return Equal(value, arguments[0]);
    if (name == "in" && arguments.size() == 1) return Contains(arguments[0], value);
    Fail("the test '" + name + "' is not supported");
  }

  const Map& globals_;
  std::vector<std::map<std::string, Value>> scopes_;
  std::vector<std::shared_ptr<Map>> namespaces_;
  std::string output_;
  std::int64_t work_ = 0;
  int line_ = 0;
  int json_depth_ = 0;
};

}  // namespace

Result<std::string> Run(const Block& program, const Map& globals) {
  try {
    Interpreter interpreter(globals);
    interpreter.Execute(program);
    return interpreter.TakeOutput();
  } catch (const Failure& failure) {
    if (failure.line == 0) return InvalidArgument(failure.why);  // the template's own words
    return InvalidArgument("line " + std::to_string(failure.line) + ": " + failure.why);
  }
}

}  // namespace zeroc::jinja
