#include "libzeroc/tokenizer/chat_template.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <vector>

namespace zeroc {
namespace {

const std::vector<ChatMessage> kChat = {
    {"system", " Be kind. "}, {"user", "Hi"}, {"assistant", "Hello"}, {"user", "?"}};

// What the template makes of kChat, or the error's text.
std::string Rendered(std::string_view source, bool add_generation_prompt = true) {
  const auto made = ChatTemplate::Parse(source, "<s>", "</s>", "t");
  if (!made.ok()) return "parse: " + std::string(made.status().message());
  const Result<std::string> text = (*made)->Render(kChat, add_generation_prompt);
  return text.ok() ? *text : "render: " + std::string(text.status().message());
}

TEST(ChatTemplate, ChatMl) {
  EXPECT_EQ(Rendered("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
                     "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
                     "{% endif %}"),
            "<|im_start|>system\n Be kind. <|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
            "<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n");
}

// The shape of Llama 2's and Mistral's templates: a leading system message, alternation, ternaries, strip.
TEST(ChatTemplate, SystemFirstAndAlternation) {
  const std::string source = R"({%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] | trim -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ (system ~ '\n\n' if loop.first and system is defined else '') ~ message.content.strip() }}
        {{- ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %})";
  EXPECT_EQ(Rendered(source), "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] ? [/INST]");
  const auto made = ChatTemplate::Parse(source, "", "", "t");
  const std::vector<ChatMessage> twice = {{"user", "a"}, {"user", "b"}};
  const Result<std::string> refused = (*made)->Render(twice, true);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(refused.status().message().find("roles must alternate"), std::string::npos);
}

TEST(ChatTemplate, TagsAloneOnTheirLineLeaveNothing) {
  EXPECT_EQ(Rendered("a\n  {% if true %}\nb\n  {% endif %}\nc"), "a\nb\nc");
  EXPECT_EQ(Rendered("a {% if true %} b{% endif %} c\n"), "a  b c") << "one line break at the end is dropped";
  EXPECT_EQ(Rendered("a\n  {{ 'x' }}\nb"), "a\n  x\nb") << "printing keeps its line";
  EXPECT_EQ(Rendered("a  {{- ' x ' -}}  b"), "a x b");
  EXPECT_EQ(Rendered("a{# {{ not run }} #}\nb"), "ab");
  EXPECT_EQ(Rendered("{{ '}} %} {{' }}"), "}} %} {{") << "delimiters in strings are text";
}

TEST(ChatTemplate, Expressions) {
  const std::pair<const char*, const char*> cases[] = {
      {"{{ 1 + 2 * 3 - 4 }}", "3"},
      {"{{ -7 // 2 }} {{ -7 % 2 }}", "-4 1"},
      {"{{ 'a' ~ 1 ~ true ~ none }}", "a1TrueNone"},
      {"{{ 'b' in 'abc' and 'x' not in 'abc' }}", "True"},
      {"{{ not 'a' == 'b' }}", "True"},
      {"{{ messages | length }}{{ messages[-1].content }}{{ messages[9] is defined }}", "4?False"},
      {"{{ nothing }}|{{ nothing | default('d') }}|{{ nothing is defined }}", "|d|False"},
      {"{{ messages[0].content | trim | upper }}", "BE KIND."},
      {"{{ 'a,b,c'.split(',')[1] }}{{ ['x', 'y'] | join('-') }}", "bx-y"},
      {"{{ 'aXbX'.replace('X', '1') }}{{ 'title case' | capitalize }}", "a1b1Title case"},
      {"{{ {'k': [1, 'ä\"', none, true]} | tojson }}", R"({"k": [1, "ä\"", null, true]})"},
      {"{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "4"},
      {"{% set n = 0 %}{% for m in messages %}{% set n = n + 1 %}{% endfor %}{{ n }}", "0"},
      {"{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"},
      {"{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% else %}no{% endfor %}", "1Hi2?"},
      {"{% for m in [] %}x{% else %}none{% endfor %}", "none"},
      {"{% for i in range(2, 4) %}{{ i }}{{ ',' if not loop.last }}{% endfor %}", "2,3"},
      {"{% if messages[0].role == 'x' %}1{% elif messages[0].role == 'system' %}2{% else %}3{% endif %}", "2"},
      {"{{ 'äöü'[1:] }}{{ 'äöü' | length }}", "öü3"},
      {"{% generation %}x{% endgeneration %}", "x"},
      {"{{ strftime_now is defined }}{{ tools is none }}{{ 'x' is string }}{{ messages is iterable }}",
       "FalseTrueTrueTrue"},
      {"{% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}", "uaus"},
  };
  for (const auto& [source, expected] : cases) EXPECT_EQ(Rendered(source), expected) << source;
}

TEST(ChatTemplate, WhatIsNotSupportedIsNamedWithItsLine) {
  const std::pair<const char*, const char*> cases[] = {
      {"{% macro f() %}{% endmacro %}", "parse: t: line 1: the tag 'macro' is not supported"},
      {"\n{% include 'x' %}", "parse: t: line 2: the tag 'include' is not supported"},
      {"{{ x", "parse: t: line 1: '{{' is not closed"},
      {"{% if x %}", "parse: t: line 1: an if has no endif"},
      {"{% for x in y %}", "parse: t: line 1: a for has no endfor"},
      {"{% endif %}", "parse: t: 'endif' closes nothing"},
      {"{{ 'x }}", "parse: t: line 1: '{{' is not closed"},
      {"{{ ! }}", "parse: t: line 1: a character is not expected here: '!'"},
      {"{{ 1 2 }}", "parse: t: line 1: '2' is not expected here"},
      {"{{ 99999999999999999999 }}", "parse: t: line 1: a number is malformed"},
      {"{{ x.__class__.__mro__ }}",
       "render: messages: the chat template refuses them: line 1: '.__class__' of what is"},
      {"{{ messages }}", "render: messages: the chat template refuses them: line 1: a list or map cannot be written"},
      {"{{ f() }}", "render: messages: the chat template refuses them: line 1: the function 'f' is not supported"},
      {"{{ 1 // 0 }}", "render: messages: the chat template refuses them: line 1: a division by 0"},
      {"{{ 'x' | xmlattr }}", "render: messages: the chat template refuses them: line 1: the filter 'xmlattr'"},
      {"{{ 'x'.format() }}", "render: messages: the chat template refuses them: line 1: the method 'format'"},
      {"{{ 1 < 'a' }}", "render: messages: the chat template refuses them: line 1: '<' does not take"},
  };
  for (const auto& [source, expected] : cases) {
    EXPECT_TRUE(Rendered(source).starts_with(expected)) << source << " gave " << Rendered(source);
  }
}

TEST(ChatTemplate, HostileTemplatesEnd) {
  const std::string bomb =
      "{% set ns = namespace(s='x') %}{% for i in range(1000) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
  EXPECT_NE(Rendered(bomb).find("too many steps"), std::string::npos);
  std::string loops;
  for (int i = 0; i < 8; ++i) loops += "{% for a" + std::to_string(i) + " in range(1000) %}";
  loops += "x";
  for (int i = 0; i < 8; ++i) loops += "{% endfor %}";
  EXPECT_NE(Rendered(loops).find("too many steps"), std::string::npos);
  EXPECT_NE(Rendered("{% for i in range(999999999) %}{% endfor %}").find("too long"), std::string::npos);
  EXPECT_NE(Rendered("{{ " + std::string(10'000, '(') + " }}").find("too deeply"), std::string::npos);
  EXPECT_NE(Rendered("{{ " + std::string(10'000, '[') + " }}").find("too deeply"), std::string::npos);
  std::string ifs;
  for (int i = 0; i < 1000; ++i) ifs += "{% if x %}";
  EXPECT_NE(Rendered(ifs).find("too deeply"), std::string::npos);
  EXPECT_NE(Rendered("{{ " + std::string(100'000, '-') + "1 }}").find("1"), std::string::npos);
  EXPECT_NE(Rendered(std::string(1 << 19, 'x')).find("more than"), std::string::npos);
  EXPECT_EQ(Rendered("{% set ns = namespace(a=1) %}{% set ns.a = ns %}ok"), "ok") << "a cycle is freed too";
  EXPECT_NE(Rendered("{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns | tojson }}").find("too deeply"),
            std::string::npos);
}

class ChatTemplateFiles : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(dir_); }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  void Write(const char* name, const std::string& text) { std::ofstream(dir_ + "/" + name) << text; }
  std::string Rendered() {
    const auto made = ChatTemplate::Open(dir_);
    return made.ok() ? *(*made)->Render({{{"user", "Hi"}}}, true) : std::string(made.status().message());
  }
  const std::string dir_ = testing::TempDir() + "chat_template_" + std::to_string(::getpid());
};

TEST_F(ChatTemplateFiles, WhereATemplateIsFound) {
  EXPECT_EQ(Rendered(), "user: Hi\nassistant:") << "without any file: the default";
  Write("tokenizer_config.json", R"({"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}1"})");
  EXPECT_EQ(Rendered(), "<b>1");
  Write("tokenizer_config.json",
        R"({"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]})");
  EXPECT_EQ(Rendered(), "d");
  Write("chat_template.jinja", "file");
  EXPECT_EQ(Rendered(), "file");
}

TEST_F(ChatTemplateFiles, BadFilesAreNamed) {
  for (const char* text : {"", "[", "[]", R"({"chat_template": 5})", R"({"chat_template": [{"name": "rag"}]})",
                           R"({"chat_template": "{% if %}"})"}) {
    Write("tokenizer_config.json", text);
    EXPECT_NE(Rendered().find("tokenizer_config.json"), std::string::npos) << text << ": " << Rendered();
  }
}

}  // namespace
}  // namespace zeroc
