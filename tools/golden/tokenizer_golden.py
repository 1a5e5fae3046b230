#!/usr/bin/env python3
"""Writes tests/data/tokenizer_golden.json: small tokenizers and what Hugging Face's `tokenizers` makes of our texts.

Usage (needs `pip install tokenizers`, best in a virtual environment; made with 0.23.3):

    tools/golden/tokenizer_golden.py tests/data/tokenizer_golden.json

Every text here is our own. The demo model's tokenizer is covered too, by its path under models/.
"""
import argparse
import base64
import json
import pathlib
import random

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = "models/zeroc-demo/tokenizer.json"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

SENTENCES = [
    "The cache keeps what the model has read, and the link carries it to the next machine.",
    "A short prompt is answered at once; a long one is cut into blocks of sixty-four tokens.",
    "She didn't know that they're late, but I'll say we've tried and he'd agree it's fine.",
    "int main(int argc, char** argv) {\n  return argc > 1 ? std::stoi(argv[1]) : 0;\n}\n",
    "for i in range(10):\n\tprint(i, 2 ** i)\n\n",
    "Numbers: 0, 7, 42, 128, 65536, 3.14159, 1e-05, 0xDEADBEEF, 12345678901234567890.",
    "Straße, café, naïve, jalapeño, Ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย.",
    "漢字とかなとカタカナ、한국어도 있습니다。简体中文，繁體中文！",
    "Emoji: 😀 👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽 — dashes – and “quotes” …",
]
EDGES = [
    "", " ", "  ", "   x", "x   ", "\n", "\r\n", " \n \n x", "\t\tx", "a\u00a0b", "a\u3000b", "a\u180eb", "a\u200bb",
    "a\u0085b", "\u2028x\u2029", "\x00", "a\x00b", "\x7f\x01", "I'LL he'S THEY'RE it's don't", "'s't're'", "ſ'ſ x'ſ",
    "1234567", "1 22 333 4444", "x1y22z", "²³¹½ⅷ٣४", "ⓐⒷ🄰", "é e\u0301 \u1e69 \u0073\u0323\u0307",
    "\ufeffBOM", "\ufffd \ufffe",
    "ǅ ǆ Ǆ ﬁ ﬀ", "A" * 300, " " * 130 + "end", "ab" * 200, "=" * 77, "\n" * 9 + "x", "a\n\n\nb\r\r\nc", "\U0010ffff",
    "!!!???...", "(a)[b]{c}<d>", "http://a.b/c?d=e&f=g#h", "snake_case CamelCase kebab-case SHOUTING",
    "<|bos|>", "x<|bos|>y", "<|bos|><|eos|>", " <|bos|> ", "<|bo", "<|bos|", "|bos|>", "<<|eos|>>",
    "<|eos|>\n\n<|eos|>",
    "MARK", "xMARK", "MARKx", "x MARK y", "x  MARK  y", "éMARK", "(MARK)", "MARKMARK", "\u00a0MARK\u00a0",
    "_MARK_", "MARK MARK",
    "LEFT", "a  LEFT  b", "LEFT LEFT", "RIGHT", "a  RIGHT \n b", "RIGHT RIGHT", "BOTH", "a \t BOTH \u3000 b",
    "BOTH BOTH",
    "a BOTHBOTH b", "NORM", "a NORM b", "a LEFTNORM b", "RIGHT  NORM", "ABCD", "ABC", "AB ABC ABCDE", "xABCDx",
    "LEFT\u180eLEFT \u2003LEFT", "ⓐMARK MARKⓐ ²MARK MARK\u200d \u0301MARK",
]


# For the tokenizer that normalises: marks that compose, that must be reordered, that a special token keeps apart, that
# never compose; Hangul; and what form C leaves alone.
FORM_C = [
    "e\u0301", "cafe\u0301 au lait", "a\u0323\u0302 a\u0302\u0323", "\u0958 \u0915\u093c", "\u212b \u2126 \u2000",
    "\u1112\u1161\u11ab\u1100\u1173\u11af", "\uac00\u11a8", "<|bos|>\u0338x", ">\u0338", "\u0301 \u0301", "\n\u0301",
    "\ufb01 \u00bd \u2460", "\U0001d15e", "\U00011131\U00011127", "e" + "\u0301" * 40, "NORM\u0301", "NORM\u0338 NORM",
    "q\u0307\u0323", "xe\u0301MARK", "e\u0301TOK", "\u00e9TOK", "e\u0301\u0323TOK", "  e\u0301TOK",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(20240817)
    pools = ["abc xyz", "AZ'sd ", "019 ", "\n\r\t  ", ".,!?-_/", "éßÿ", "жЯ",
             "漢字あ", "😀👍", "\u0301\u200d", "<|bos|>", "LEFT", " "]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


def invalid_utf8() -> list[bytes]:
    pieces = [b"\xff", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80",
              b"\x80"]
    return [b"ab" + p + b" cd" for p in pieces]


def train(added: list, **settings) -> dict:
    """A byte-level BPE of 256 bytes and about 100 merges over our sentences, as the dictionary of its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = settings["pre"]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|bos|>", "<|eos|>"], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    if "normalizer" in settings:
        tokenizer.normalizer = settings["normalizer"]
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if "post" in settings:
        tokenizer.post_processor = settings["post"]
    return json.loads(tokenizer.to_str())


def make_tokenizers() -> dict:
    isolated = lambda regex: pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bos = processors.TemplateProcessing(single="<|bos|> $A",
                                        pair="<|bos|> $A <|bos|> $B:1", special_tokens=[("<|bos|>", 0)])
    wrap = processors.TemplateProcessing(single="<|bos|> $A <|eos|> <|eos|>",
                                         special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])
    token = tokenizers.AddedToken
    options = [token("MARK", single_word=True, normalized=False), token("LEFT", lstrip=True, normalized=False),
               token("RIGHT", rstrip=True, normalized=False), token("BOTH", lstrip=True, rstrip=True, special=True),
               token("NORM", normalized=True, lstrip=True), token("ABCD", normalized=False),
               token("AB", normalized=False)]
    sequence = pre_tokenizers.Sequence
    out = {
        "llama3": train([], pre=sequence([isolated(LLAMA3), plain]),
                        post=processors.Sequence([processors.ByteLevel(), bos])),
        "gpt2": train([], pre=pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "prefix_space": train([token("MARK", normalized=False)],
                              pre=pre_tokenizers.ByteLevel(add_prefix_space=True), post=wrap),
        "o200k": train([], pre=sequence([isolated(O200K), plain]), post=bos),
        "added": train(options, pre=sequence([isolated(LLAMA3), plain]), post=wrap),
        "split_prefix": train([], pre=sequence([isolated(r"\p{N}{1,3}"),
                                                pre_tokenizers.ByteLevel(add_prefix_space=True)])),
    }
    for behavior in ["removed", "merged_with_previous", "merged_with_next", "contiguous"]:
        pre = sequence([pre_tokenizers.Split(" ", behavior),
                        pre_tokenizers.Split(tokenizers.Regex("[aeiou]"), behavior), plain])
        out["split_" + behavior] = train([], pre=pre)
    out["split_inverted"] = train([], pre=sequence(
        [pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\d"), "merged_with_previous", invert=True), plain]))
    out["split_empty_matches"] = train([], pre=sequence([isolated(r"x*"), plain]))
    out["nfc"] = train([token("NORM", normalized=True), token("MARK", normalized=False),
                        token("e\u0301TOK", normalized=True)],
                       pre=sequence([isolated(LLAMA3), plain]), normalizer=normalizers.NFC())
    # Both spellings of a merge occur in the field; the library writes the list form.
    out["gpt2"]["model"]["merges"] = [" ".join(merge) for merge in out["gpt2"]["model"]["merges"]]
    # Words that no sequence of merges reaches, so that ignore_merges shows.
    out["ignore_merges"] = json.loads(json.dumps(out["llama3"]))
    model = out["ignore_merges"]["model"]
    model["ignore_merges"] = True
    for word in ["Ġqux", "SHOUTING", "漢字", "ĠCamel"]:
        mapped = word if word.startswith("Ġ") else plain.pre_tokenize_str(word)[0][0]
        model["vocab"][mapped] = len(model["vocab"])
    return out


def cases_of(name: str, tokenizer: Tokenizer, texts: list[str]) -> list[dict]:
    out = []
    for text in texts:
        for parse in [True, False]:
            tokenizer.encode_special_tokens = not parse
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            case = {"tokenizer": name, "text": text, "parse_special": parse, "ids": ids}
            if len(text) < 20:  # what a post-processor adds does not depend on the text
                case["ids_with_special"] = tokenizer.encode(text, add_special_tokens=True).ids
            if out and not parse and {**case, "parse_special": True} == out[-1]:
                continue  # the same as with special tokens
            out.append(case)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    specs = make_tokenizers()
    texts = SENTENCES + EDGES + random_texts(40)
    cases = cases_of(DEMO, Tokenizer.from_file(str(ROOT / DEMO)), texts)
    for name, spec in specs.items():
        cases += cases_of(name, Tokenizer.from_str(json.dumps(spec)), texts + ["a qux qux SHOUTING 漢字 Camel"] +
                          (FORM_C if name == "nfc" else []))
    round_trips = [base64.b64encode(b).decode() for b in invalid_utf8()]
    with args.out.open("w", encoding="utf-8") as file:
        # One case per line keeps the differences of a new version readable.
        file.write('{"made_with":' + json.dumps(f"tokenizers {tokenizers.__version__}") + ',\n"tokenizers":{\n')
        dump = lambda value: json.dumps(value, ensure_ascii=True, separators=(",", ":"))
        file.write(",\n".join(dump(k) + ":" + dump(v) for k, v in specs.items()))
        file.write('\n},\n"invalid_utf8":' + dump(round_trips) + ',\n"cases":[\n')
        file.write(",\n".join(dump(case) for case in cases) + "\n]}\n")


if __name__ == "__main__":
    main()
