// From a template's text to its syntax tree.
#include <algorithm>

#include "libzeroc/tokenizer/jinja.h"

namespace zeroc::jinja {
namespace {

constexpr int kNestingMax = 64;
constexpr std::size_t kSourceBytesMax = 1 << 18;

Status Error(int line, const std::string& why) { return InvalidArgument("line " + std::to_string(line) + ": " + why); }

// Expressions of one tag. The first error sticks; the tree is dropped with it.
class ExprParser {
 public:
  explicit ExprParser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  ExprPtr Expression() {
    if (++depth_ > kNestingMax) return Fail("expressions are nested too deeply");
    ExprPtr expr = Or();
    while (AcceptName("if")) {
      ExprPtr condition = Or();
      ExprPtr otherwise = AcceptName("else") ? Expression() : nullptr;
      expr = Make(Expr::Kind::kIfElse, "", std::move(expr), std::move(condition));
      expr->args.push_back(std::move(otherwise));
    }
    --depth_;
    return expr;
  }
  // Without the inline if, which would take the `if` of a for tag.
  ExprPtr Or() {
    return Chain({"or"}, [this] { return And(); });
  }

  bool AcceptName(std::string_view name) { return Accept(Token::Kind::kName, name); }
  bool AcceptOperator(std::string_view text) { return Accept(Token::Kind::kOperator, text); }
  std::string TakeName() {
    if (Peek().kind != Token::Kind::kName) Fail("a name is expected");
    return Take().text;
  }
  Status Done() {
    if (status_.ok() && Peek().kind != Token::Kind::kEnd) Fail("'" + Peek().text + "' is not expected here");
    return status_;
  }
  int line() const { return Peek().line; }
  ExprPtr Fail(const std::string& why) {
    if (status_.ok()) status_ = Error(line(), why);
    at_ = tokens_.size() - 1;  // nothing more is read
    return Make(Expr::Kind::kLiteral, "");
  }

 private:
  const Token& Peek() const { return tokens_[at_]; }
  Token Take() { return at_ + 1 < tokens_.size() ? tokens_[at_++] : tokens_[at_]; }
  bool Accept(Token::Kind kind, std::string_view text) {
    if (Peek().kind != kind || Peek().text != text) return false;
    Take();
    return true;
  }
  template <typename... Args>
  ExprPtr Make(Expr::Kind kind, std::string text, Args... args) {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line();
    expr->text = std::move(text);
    (expr->args.push_back(std::move(args)), ...);
    return expr;
  }
  template <typename F>
  ExprPtr Chain(std::initializer_list<std::string_view> operators, F next) {
    ExprPtr left = next();
    for (int n = 0;; ++n) {
      const Token& token = Peek();
      const bool usable = token.kind == Token::Kind::kOperator || token.kind == Token::Kind::kName;
      if (!usable || std::find(operators.begin(), operators.end(), token.text) == operators.end()) return left;
      if (n > 4 * kNestingMax) return Fail("an expression is too long");
      const std::string text = Take().text;
      ExprPtr right = next();
      left = Make(Expr::Kind::kBinary, text, std::move(left), std::move(right));
    }
  }

  ExprPtr And() {
    return Chain({"and"}, [this] { return Not(); });
  }
  ExprPtr Not() {
    bool negate = false;
    while (AcceptName("not")) negate = !negate;
    ExprPtr expr = Compare();
    return negate ? Make(Expr::Kind::kUnary, "not", std::move(expr)) : std::move(expr);
  }
  ExprPtr Compare() {
    ExprPtr left = Chain({"==", "!=", "<", ">", "<=", ">=", "in"}, [this] { return Sum(); });
    if (!AcceptName("not")) return left;
    if (!AcceptName("in")) return Fail("'in' is expected after 'not'");
    ExprPtr in = Make(Expr::Kind::kBinary, "in", std::move(left), Sum());
    return Make(Expr::Kind::kUnary, "not", std::move(in));
  }
  ExprPtr Sum() {
    return Chain({"+", "-"}, [this] { return Concat(); });
  }
  ExprPtr Concat() {
    return Chain({"~"}, [this] { return Product(); });
  }
  ExprPtr Product() {
    return Chain({"*", "/", "//", "%"}, [this] { return Unary(); });
  }
  ExprPtr Unary() {
    bool negate = false;
    while (AcceptOperator("-")) negate = !negate;
    ExprPtr expr = Postfix(Primary());
    return negate ? Make(Expr::Kind::kUnary, "-", std::move(expr)) : std::move(expr);
  }

  ExprPtr Postfix(ExprPtr expr) {
    for (int n = 0; n <= kNestingMax; ++n) {
      if (AcceptOperator(".")) {
        std::string name = TakeName();
        expr = Make(Expr::Kind::kAttr, std::move(name), std::move(expr));
      } else if (AcceptOperator("[")) {
        expr = Subscript(std::move(expr));
      } else if (AcceptOperator("(")) {
        expr = Make(Expr::Kind::kCall, "", std::move(expr));
        Arguments(expr.get());
      } else if (AcceptOperator("|")) {
        std::string name = TakeName();
        expr = Make(Expr::Kind::kFilter, std::move(name), std::move(expr));
        if (AcceptOperator("(")) Arguments(expr.get());
      } else if (AcceptName("is")) {
        expr = Test(std::move(expr));
      } else {
        return expr;
      }
    }
    return Fail("an expression is too long");
  }
  ExprPtr Test(ExprPtr expr) {
    const bool negate = AcceptName("not");
    std::string name = TakeName();
    expr = Make(Expr::Kind::kTest, std::move(name), std::move(expr));
    if (AcceptOperator("(")) Arguments(expr.get());
    return negate ? Make(Expr::Kind::kUnary, "not", std::move(expr)) : std::move(expr);
  }
  ExprPtr Subscript(ExprPtr object) {
    ExprPtr first, second;
    bool slice = false;
    if (!AcceptOperator(":")) {
      first = Expression();
      slice = AcceptOperator(":");
    } else {
      slice = true;
    }
    if (slice && AcceptOperator(":")) {  // [::-1] is the one step that templates use
      if (!AcceptOperator("-") || Take().text != "1" || !AcceptOperator("]"))
        return Fail("only the step -1 is supported");
      if (first != nullptr) return Fail("a step with a beginning is not supported");
      return Make(Expr::Kind::kFilter, "reverse", std::move(object));
    }
    const bool closed = AcceptOperator("]");
    if (slice && !closed) second = Expression();
    if (!closed && !AcceptOperator("]")) return Fail("']' is expected");
    if (!slice) return Make(Expr::Kind::kIndex, "", std::move(object), std::move(first));
    return Make(Expr::Kind::kSlice, "", std::move(object), std::move(first), std::move(second));
  }
  void Arguments(Expr* call) {
    while (!AcceptOperator(")")) {
      const bool named = Peek().kind == Token::Kind::kName &&
                         tokens_[std::min(at_ + 1, tokens_.size() - 1)].text == "=" &&
                         tokens_[std::min(at_ + 1, tokens_.size() - 1)].kind == Token::Kind::kOperator;
      if (named) {
        std::string name = Take().text;
        Take();
        call->named.emplace_back(std::move(name), Expression());
      } else {
        call->args.push_back(Expression());
      }
      if (AcceptOperator(",")) continue;
      if (!AcceptOperator(")")) Fail("')' is expected");
      return;
    }
  }

  ExprPtr Primary() {
    const Token token = Take();
    if (token.kind == Token::Kind::kString) {
      ExprPtr expr = Make(Expr::Kind::kLiteral, "");
      std::string text = token.text;
      while (Peek().kind == Token::Kind::kString) text += Take().text;  // adjacent strings are one
      expr->value.v = std::move(text);
      return expr;
    }
    if (token.kind == Token::Kind::kInteger) {
      ExprPtr expr = Make(Expr::Kind::kLiteral, "");
      expr->value.v = static_cast<std::int64_t>(std::stoll(token.text));
      return expr;
    }
    if (token.kind == Token::Kind::kName) return Name(token.text);
    if (token.kind == Token::Kind::kOperator && token.text == "(") {
      ExprPtr expr = Expression();
      if (!AcceptOperator(")")) return Fail("')' is expected (tuples are not supported)");
      return expr;
    }
    if (token.kind == Token::Kind::kOperator && (token.text == "[" || token.text == "{")) return Literal(token.text);
    return Fail("an expression is expected");
  }
  ExprPtr Name(const std::string& name) {
    ExprPtr expr = Make(Expr::Kind::kName, name);
    const bool is_true = name == "true" || name == "True", is_false = name == "false" || name == "False";
    if (!is_true && !is_false && name != "none" && name != "None") return expr;
    expr->kind = Expr::Kind::kLiteral;
    if (is_true || is_false) {
      expr->value.v = is_true;
    } else {
      expr->value.v = None{};
    }
    return expr;
  }
  ExprPtr Literal(const std::string& open) {
    const bool is_map = open == "{";
    const char* close = is_map ? "}" : "]";
    ExprPtr expr = Make(is_map ? Expr::Kind::kMap : Expr::Kind::kList, "");
    while (!AcceptOperator(close)) {
      expr->args.push_back(Expression());
      if (is_map && !AcceptOperator(":")) return Fail("':' is expected");
      if (is_map) expr->args.push_back(Expression());
      if (AcceptOperator(",")) continue;
      if (!AcceptOperator(close)) return Fail(std::string("'") + close + "' is expected");
      break;
    }
    return expr;
  }

  std::vector<Token> tokens_;
  std::size_t at_ = 0;
  int depth_ = 0;
  Status status_;
};

// A piece of the source: text, or a tag's code.
struct Piece {
  enum class Kind : std::uint8_t { kText, kPrint, kTag };
  Kind kind;
  std::string text;
  int line;
};

// Jinja's whitespace rules with trim_blocks and lstrip_blocks: a tag alone on its line leaves nothing of it.
class Splitter {
 public:
  explicit Splitter(std::string_view source) : source_(source) {}

  Result<std::vector<Piece>> Split() {
    while (at_ < source_.size()) {
      const std::size_t open = NextOpen();
      AddText(source_.substr(at_, open - at_), open);
      if (open == source_.size()) break;
      ZEROC_RETURN_IF_ERROR(AddTag(open));
    }
    return std::move(pieces_);
  }

 private:
  std::size_t NextOpen() const {
    for (std::size_t i = at_; i + 1 < source_.size(); ++i) {
      if (source_[i] == '{' && (source_[i + 1] == '{' || source_[i + 1] == '%' || source_[i + 1] == '#')) return i;
    }
    return source_.size();
  }
  char At(std::size_t i) const { return i < source_.size() ? source_[i] : '\0'; }

  void AddText(std::string_view text, std::size_t open) {
    const int line = line_;
    line_ += static_cast<int>(std::count(text.begin(), text.end(), '\n'));
    const bool tag = open < source_.size();
    if (strip_next_) {
      text.remove_prefix(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
    } else if (after_block_ && text.starts_with('\n')) {
      text.remove_prefix(1);
    } else if (after_block_ && text.starts_with("\r\n")) {
      text.remove_prefix(2);
    }
    if (tag && At(open + 2) == '-') {
      const std::size_t last = text.find_last_not_of(" \t\r\n");
      text = text.substr(0, last == std::string_view::npos ? 0 : last + 1);
    } else if (tag && At(open + 1) != '{' && At(open + 2) != '+') {
      const std::size_t last = text.find_last_not_of(" \t");
      const bool line_start =
          last == std::string_view::npos ? (open - at_ == text.size() ? at_line_start_ : true) : text[last] == '\n';
      if (line_start) text = text.substr(0, last == std::string_view::npos ? 0 : last + 1);
    }
    if (!text.empty()) pieces_.push_back({Piece::Kind::kText, std::string(text), line});
  }

  Status AddTag(std::size_t open) {
    const char kind = source_[open + 1];
    const std::string close = kind == '{' ? "}}" : std::string(1, kind) + "}";
    std::size_t begin = open + 2;
    if (At(begin) == '-' || (At(begin) == '+' && kind != '{')) ++begin;
    const std::size_t end = FindClose(begin, close, kind);
    if (end == std::string_view::npos) return Error(line_, "'{" + std::string(1, kind) + "' is not closed");
    std::string_view code = source_.substr(begin, end - begin);
    const int line = line_;
    line_ += static_cast<int>(std::count(code.begin(), code.end(), '\n'));
    strip_next_ = code.ends_with('-');
    if (strip_next_ || code.ends_with('+')) code.remove_suffix(1);
    after_block_ = kind != '{' && !source_.substr(begin, end - begin).ends_with('+');
    at_ = end + 2;
    at_line_start_ = after_block_ && (At(at_) == '\n');
    if (kind != '#')
      pieces_.push_back({kind == '{' ? Piece::Kind::kPrint : Piece::Kind::kTag, std::string(code), line});
    return OkStatus();
  }

  // Delimiters inside strings are text.
  std::size_t FindClose(std::size_t at, const std::string& close, char kind) const {
    char quote = '\0';
    for (; at + 1 < source_.size(); ++at) {
      const char c = source_[at];
      if (quote != '\0') {
        if (c == '\\') ++at;
        if (c == quote) quote = '\0';
      } else if (kind != '#' && (c == '\'' || c == '"')) {
        quote = c;
      } else if (source_.substr(at, 2) == close) {
        return at;
      }
    }
    return std::string_view::npos;
  }

  const std::string_view source_;
  std::size_t at_ = 0;
  int line_ = 1;
  bool strip_next_ = false, after_block_ = false;
  bool at_line_start_ = true;
  std::vector<Piece> pieces_;
};

// Statements over the pieces.
class BlockParser {
 public:
  explicit BlockParser(std::vector<Piece> pieces) : pieces_(std::move(pieces)) {}

  // Up to one of the tags that end the enclosing statement, whose keyword it leaves in end_.
  Result<Block> Parse(int depth) {
    if (depth > kNestingMax) return Error(Line(), "statements are nested too deeply");
    Block block;
    end_.clear();
    while (at_ < pieces_.size()) {
      Piece piece = std::move(pieces_[at_++]);
      if (piece.kind == Piece::Kind::kText) {
        block.push_back(NewNode(Node::Kind::kText, piece.line));
        block.back().text = std::move(piece.text);
        continue;
      }
      std::vector<Token> tokens;
      ZEROC_ASSIGN_OR_RETURN(tokens, Tokenize(piece.text, piece.line));
      ExprParser parser(std::move(tokens));
      if (piece.kind == Piece::Kind::kPrint) {
        block.push_back(NewNode(Node::Kind::kPrint, piece.line));
        block.back().expr = parser.Expression();
        ZEROC_RETURN_IF_ERROR(parser.Done());
        continue;
      }
      ZEROC_RETURN_IF_ERROR(Statement(piece.line, parser, depth, &block));
      if (!end_.empty()) return block;
    }
    return block;
  }
  const std::string& end() const { return end_; }

 private:
  static Node NewNode(Node::Kind kind, int line) {
    Node node;
    node.kind = kind;
    node.line = line;
    return node;
  }
  int Line() const { return at_ > 0 && at_ <= pieces_.size() ? pieces_[at_ - 1].line : 1; }

  Status Statement(int line, ExprParser& parser, int depth, Block* block) {
    const std::string keyword = parser.TakeName();
    if (keyword == "if") return If(line, parser, depth, block);
    if (keyword == "for") return For(line, parser, depth, block);
    if (keyword == "set") return Set(line, parser, block);
    if (keyword == "generation" || keyword == "endgeneration") return parser.Done();  // marks for training: no text
    if (keyword == "elif" || keyword == "else" || keyword == "endif" || keyword == "endfor") {
      end_ = keyword;
      if (keyword != "elif") return parser.Done();
      end_condition_ = parser.Expression();
      return parser.Done();
    }
    if (keyword.empty()) return parser.Done();
    return Error(line, "the tag '" + keyword.substr(0, 32) + "' is not supported");
  }

  Status If(int line, ExprParser& parser, int depth, Block* block) {
    Node node = NewNode(Node::Kind::kIf, line);
    ExprPtr condition = parser.Expression();
    ZEROC_RETURN_IF_ERROR(parser.Done());
    for (;;) {
      Block branch;
      ZEROC_ASSIGN_OR_RETURN(branch, Parse(depth + 1));
      const bool was_else = condition == nullptr;
      node.branches.emplace_back(std::move(condition), std::move(branch));
      if (end_ == "endif") break;
      if (was_else || (end_ != "elif" && end_ != "else")) return Error(line, "an if has no endif");
      condition = end_ == "elif" ? std::move(end_condition_) : nullptr;
    }
    end_.clear();
    block->push_back(std::move(node));
    return OkStatus();
  }

  Status For(int line, ExprParser& parser, int depth, Block* block) {
    Node node = NewNode(Node::Kind::kFor, line);
    do {
      node.names.push_back(parser.TakeName());
    } while (parser.AcceptOperator(","));
    if (!parser.AcceptName("in")) parser.Fail("'in' is expected");
    node.expr = parser.Or();
    if (parser.AcceptName("if")) node.condition = parser.Expression();
    ZEROC_RETURN_IF_ERROR(parser.Done());
    ZEROC_ASSIGN_OR_RETURN(node.body, Parse(depth + 1));
    if (end_ == "else") {
      ZEROC_ASSIGN_OR_RETURN(node.otherwise, Parse(depth + 1));
    }
    if (end_ != "endfor") return Error(line, "a for has no endfor");
    end_.clear();
    block->push_back(std::move(node));
    return OkStatus();
  }

  static Status Set(int line, ExprParser& parser, Block* block) {
    Node node = NewNode(Node::Kind::kSet, line);
    node.names.push_back(parser.TakeName());
    if (parser.AcceptOperator(".")) node.text = parser.TakeName();
    if (!parser.AcceptOperator("=")) parser.Fail("'=' is expected (block sets are not supported)");
    node.expr = parser.Expression();
    ZEROC_RETURN_IF_ERROR(parser.Done());
    block->push_back(std::move(node));
    return OkStatus();
  }

  std::vector<Piece> pieces_;
  std::size_t at_ = 0;
  std::string end_;
  ExprPtr end_condition_;
};

}  // namespace

Result<Block> Parse(std::string_view source) {
  if (source.size() > kSourceBytesMax) {
    return InvalidArgument("the template has more than " + std::to_string(kSourceBytesMax) + " bytes");
  }
  if (source.ends_with('\n')) source.remove_suffix(1);  // Jinja drops one line break at the end
  std::vector<Piece> pieces;
  ZEROC_ASSIGN_OR_RETURN(pieces, Splitter(source).Split());
  BlockParser parser(std::move(pieces));
  Block block;
  ZEROC_ASSIGN_OR_RETURN(block, parser.Parse(0));
  if (!parser.end().empty()) return InvalidArgument("'" + parser.end() + "' closes nothing");
  return block;
}

}  // namespace zeroc::jinja
