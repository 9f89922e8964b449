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

CONTRACTIONS = ["it's", "IT'S", "don't", "DON'T", "we're they're", "I've", "I'm", "you'll", "he'd", "'s", "'t're've'm'll'd",
                "it’s", "don’t", "rock'n'roll", "o'clock", "dogs' toys", "'tis", "y'all'd've", "s's's", "'S 'T 'RE", "'ſ", "it'ſ"]
SPACE = [" ", "   ", "\t", "\n", "\r\n", " a", "a ", "  a  b  ", "a\tb", "a\nb", "a\r\nb", "a\vb", "a\fb", "a\u0085b", "a\u00a0b",
         "a\u1680b", "a\u2000b\u2003c\u200a", "a\u2028b\u2029c", "a\u202fb", "a\u205fb", "a\u3000b", "a\u200bb", "a\ufeffb",
         "\ufeffa", "a\u180eb", "a\u001cb\u001db", "\u3000", "a\u2060b", "a\u00adb", "\n\n\n a \t\t b \n"]
HTML = ["<b>bold</b>", "a &amp; b", "&lt;tag&gt;", "&nbsp;", "&#39;quoted&#39;", "&#x1F600;", "&amp;amp;", "<br/>", "<!-- note -->",
        "<a href=\"x\">y</a>", "&unknown;", "&copy; 2024", "<|startoftext|>", "<|endoftext|>", "a<|endoftext|>b", "<|startoftext|>a<|endoftext|>",
        "<|ENDOFTEXT|>", "<|StartOfText|> a", "<|endoftext", "endoftext|>", "<|endoftext|><|endoftext|>", " <|endoftext|> ", "<|pad|>",
        "<|end oftext|>", "<|startoftext|>'s"]
UNICODE = ["café", "cafe\u0301", "naïve façade", "Ångström", "A\u030angstro\u0308m", "ﬁne ﬂow", "ß ẞ", "İstanbul", "ı I i İ", "ǅ ǆ Ǆ",
           "Σίσυφος", "ΣΑΣ", "ὈΔΥΣΣΕΎΣ", "Привет, мир", "ПРИВЕТ", "שלום", "مرحبا بالعالم", "السَّلَام", "हिन्दी", "नमस्ते दुनिया", "ไทย", "สวัสดี",
           "ქართული", "Հայերեն", "አማርኛ", "Ω Ω", "Å Å K K", "½ ¼ ²³", "①②③ Ⅳ", "٣٤٥", "१२३", "𝟘𝟙𝟚", "𝒜𝓁𝑔𝑒𝒷𝓇𝒶", "ＦＵＬＬ　ｗｉｄｔｈ", "x̄ ŷ", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A",
           "€ £ ¥ ₹", "™ ® ©", "→ ⇒ ↔", "∀x∈ℝ", "∑∫∂", "\u0000", "a\u0000b", "\u0007", "\u007f", "\ufffd", "\ue000", "\U0010ffff", "\u0301", "a\u0301\u0323",
           "a\u0323\u0301", "\u1e9b\u0323", "각", "\u1100\u1161\u11a8", "ﷺ", "\u202eright-to-left", "\u2066x\u2069", "ǰ", "ŉ", "ΐ", "Ⴀ ⴀ", "Ა", "Ꭰ ꭰ", "𐐀 𐐨", "ᵃᵇ", "ʰ"]
CJK = ["你好", "你好，世界", "猫的照片", "一张猫的照片。", "日本語", "日本語のテキスト", "カタカナ ｶﾀｶﾅ", "が か\u3099", "한국어", "고양이 사진", "漢字かな交じり文", "𠮷野家", "㍿ ㈱", "「引用」",
       "３個", "你好world你好", "北京2008", "豈", "\U0002f800"]
EMOJI = ["😀", "😀😀😀", "a 😀 b", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "❤️", "❤", "☺︎", "1️⃣", "#️⃣", "🧑🏿‍🚀", "🫠", "🦩", "👁️‍🗨️", "♀️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
         "cat🐱dog🐶", "🐱's", "\u200d", "\ufe0f", "🤷‍♂️ who knows"]

ALPHABETS = ["abc xyz", "ABC'st ", "0123 .,", "éüñ çã", "猫犬鳥 ", "😀🐱🎉 ", "<>&;|/ ", "абв Где", "\t\n  a", "'s't'm'd "]


def main():
    rng = random.Random(0)
    texts = list(dict.fromkeys(FIXED + CONTRACTIONS + SPACE + HTML + UNICODE + CJK + EMOJI + [
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
