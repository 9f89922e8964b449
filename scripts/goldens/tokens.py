"""Goldens of the tokeniser: awkward strings and the ids that transformers gives them.

    python scripts/goldens/tokens.py        # writes tests/data/tokens.json

The embedded tokeniser stands for all: it is CLIP's byte-level BPE with a small vocabulary.
"""

import json
import pathlib
import random
import tempfile
import shutil

from transformers import CLIPTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]

FIXED = [
    "", " ", "\t\n", "a", "A photo of a CAT.", "a photo of a cat.", "don't can't I'm we've they'll he'd it's you're",
    "DON'T CAN'T", "don’t — “quoted” … text", "1234567890", "3.14159", "12:30", "100%", "$5.00", "a1b2c3", "C++ & C#",
    "<|startoftext|>", "<|endoftext|>", "a <|endoftext|> b", "<|startoftext|>x<|endoftext|>", "< | endoftext | >",
    "<b>bold</b> &amp; &lt;i&gt; &nbsp; &#39;", "https://example.org/a?b=c&d=e#f", "user@example.org", "#hashtag @mention",
    "café naïve coöperate Ångström", "cafe\u0301 nai\u0308ve", "ﬁ ﬂ ½ ² Ⅳ", "ＦＵＬＬ ｗｉｄｔｈ", "ß ẞ İ ı ſ", "ΑΒΓ αβγ ς", "Привет, мир!",
    "你好，世界", "一只猫的照片", "こんにちは世界", "猫の写真", "안녕하세요 세계", "สวัสดีชาวโลก", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया",
    "😀", "😀😃😄", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "❤️", "☃", "a😀b", "emoji 🐱 inside", "🧑🏿‍🚀 in space",
    "\u200bzero\u200bwidth", "non\u00a0breaking", "em\u2003space", "line\u2028separator", "a\u0000b", "\ufeffbom", "tab\tand\nnewline\r\n",
    "   leading", "trailing   ", "many     spaces", "!!!", "...", "?!?!", "-", "--", "---", "_", "a_b_c", "snake_case", "CamelCase",
    "a/b", "a\\b", "(a)", "[a]", "{a}", "'", "''", "'s", "s's", "'S", "’s", "`code`", "\"", "^", "~", "|", "=", "+", "*",
    "x" * 200, "word " * 100, "no" * 60, "1 " * 50, "é" * 40, "猫" * 40, "😀" * 20,
]

ALPHABETS = ["abc xyz", "ABC'st ", "0123 .,", "éüñ çã", "猫犬鳥 ", "😀🐱🎉 ", "<>&;|/ ", "абв Где", "\t\n  a", "'s't'm'd "]


def main():
    rng = random.Random(0)
    texts = list(dict.fromkeys(FIXED + [
        "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 24))) for alphabet in ALPHABETS for _ in range(15)
    ]))
    full = CLIPTokenizer.from_pretrained(ROOT / "src/builtin/tiny")
    with tempfile.TemporaryDirectory() as tmp:
        for name in ["vocab.json", "merges.txt"]:
            shutil.copy(ROOT / "src/builtin/tiny" / name, tmp)
        parts = CLIPTokenizer.from_pretrained(tmp)
        cases = []
        for text in texts:
            ids = full(text, truncation=True, max_length=32)["input_ids"]
            assert ids == parts(text, truncation=True, max_length=32)["input_ids"], text
            cases.append({"text": text, "ids": ids})
    out = ROOT / "tests/data/tokens.json"
    out.write_text(json.dumps(cases, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(len(cases), "texts,", out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
