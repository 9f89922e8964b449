"""Tables of ftfy and of Python's `html`, for src/clip/clean: what OpenAI and open_clip do to a text before it is split.

    python scripts/text_cleaning_data.py   # writes src/clip/clean/tables.json and tests/data/open_clip/cleaned.json

ftfy 6.3.1 (Apache-2.0); the regular expressions are its own, with their classes filled in.
"""

import html
import html.entities
import json
import pathlib
import re

import ftfy
from ftfy import badness, chardata
from open_clip.tokenizer import get_clean_fn

ROOT = pathlib.Path(__file__).resolve().parents[1]


def expression(pattern):
    """Without the white space and comments of re.VERBOSE, whose rules differ from one engine to another."""
    out, inside, i = [], False, 0
    while i < len(pattern):
        c = pattern[i]
        if c == "\\":
            out.append(pattern[i : i + 2])
            i += 2
            continue
        if c == "[" and not inside:
            inside = True
        elif c == "]" and inside:
            inside = False
        if not inside and c == "#":
            i = pattern.index("\n", i)
            continue
        if inside or c not in " \t\n":
            out.append("\\" + c if inside and c in "&~|" else c)
        i += 1
    return "".join(out)


def tables():
    bytes_ = bytes(range(256))
    encodings = [e for e in chardata.CHARMAP_ENCODINGS if e != "latin-1"]
    width = {chr(k): v for k, v in chardata.WIDTH_MAP.items()}
    upper = {k[1:]: v for k, v in chardata.HTML_ENTITIES.items() if k[1:] not in html.entities.html5}
    return {
        "badness": expression(badness.BADNESS_RE.pattern),
        "embedded": expression(chardata.UTF8_DETECTOR_RE.pattern),
        "altered": chardata.ALTERED_UTF8_RE.pattern.decode("latin-1"),
        "lossy": chardata.LOSSY_UTF8_RE.pattern.decode("latin-1").replace("[\x1a?", "[\x1a\\?"),
        "encodings": [[e, bytes_.decode(e)] for e in encodings],
        "replaced": {**{chr(k): v for k, v in chardata.LIGATURES.items()}, **width},
        "controls": "".join(map(chr, chardata.CONTROL_CHARS)),
        "entities": html.entities.html5,
        "entities_upper": upper,
        "invalid_references": {str(k): v for k, v in html._invalid_charrefs.items()},
        "invalid_codepoints": sorted(html._invalid_codepoints),
    }


def awkward():
    plain = ["a photo of a café", "the dog’s “bone”", "naïve — test…", "Ünïcödé", "ﬁne ﬂower ﬃ", "ＦＵＬＬ　ｗｉｄｔｈ", "ｶﾞ half", "日本語の写真",
             "кошка на окне", "γάτα", "قطة", "🐱 emoji ❤️", "price €5 £3 ¥7", "½ × ÷ ±", "«guillemets» ‹single›", "crème brûlée à la carte",
             "e\u0301 combining", "soft\xadhyphen", "no\xa0break", "zero\u200bwidth", "bom\ufeffinside", "tab\tand  spaces ", "line\r\nbreak\x85next\u2028",
             "bell\x07 null\x00 del\x7f", "\x1b[36;44mterminal\x1b[0m", "c1 \x93quoted\x94 \x85", "lossy � text", "IJ Ĳ ĳ ǆ ŉ", "Straße ẞ", "ΣΑΣ Σ",
             "l’été à Paris", "São Paulo", "Łódź", "Škoda", "İstanbul", "Þór", "œuvre Œ", "Â ", "Ã ", "50° North", "x² y³", "™ ® ©", "voilà le travail", "à noite"]
    texts = list(plain)
    for text in plain:
        for encoding in ["latin-1", "sloppy-windows-1252", "sloppy-windows-1251", "sloppy-windows-1250", "sloppy-windows-1253", "sloppy-windows-1254",
                         "sloppy-windows-1257", "iso-8859-2", "macroman", "cp437"]:
            try:
                once = text.encode().decode(encoding)
            except UnicodeError:
                continue
            texts += [once, once.replace("\xa0", " "), f"a {once} near plain ’ text"]
            try:
                texts.append(once.encode().decode(encoding))
            except UnicodeError:
                pass
    entities = ["&amp;", "&amp;amp;", "&lt;b&gt;", "&eacute;", "&EACUTE;", "&notit;", "&not", "&copy", "&#39;", "&#x2019;", "&#146;", "&#0;", "&#xD800;",
                "&#1114112;", "&#99999999999999999999;", "&unknown;", "&", "&;", "&#;", "&#x;", "AT&T", "&NotEqualTilde;", "&ampersand", "&hearts;", "&ldquo;hi&rdquo;",
                "&nbsp;", "fish & chips", "&#8220;", "&SZLIG;", "&amp;#39;", "&amp;lt;", "&#1;", "&#11;"]
    texts += entities + [f"a {e} b" for e in entities] + [f"<i>{e}</i>" for e in entities] + [f"x<y\n{e} ’" for e in entities]
    return list(dict.fromkeys(t for t in texts if not any(0xD800 <= ord(c) < 0xE000 for c in t)))


def main():
    write = lambda path, value: (ROOT / path).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")
    write("src/clip/clean/tables.json", tables())
    re.compile(tables()["badness"])
    cleaned = {kind: get_clean_fn(kind) for kind in ["lower", "whitespace", "canonicalize"]}
    texts = awkward()
    # Every text alone, and what all of Python's entities become.
    rows = [[t, ftfy.fix_text(t), cleaned["lower"](t), cleaned["canonicalize"](t)] for t in texts]
    names = [f"&{n}x" for n in html.entities.html5]
    write("tests/data/open_clip/cleaned.json", {"texts": rows, "entities": [[n, html.unescape(n)] for n in names if not n.endswith(";x")]})


if __name__ == "__main__":
    main()
