"""Pages: the declared charset, cut characters, characters that XML forbids, and deep nesting."""

# ruff: noqa: RUF001 - texts of many scripts
from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from pipeline.data.readers.html import MAX_DEPTH, declared_charset, decode
from pipeline.data.readers.units import Rejected, Text
from tests.pipeline.data.readers.reading import one_bad, read_all

TEXTS = {
    "ja": "日本語の文章です。ここに書いてあります。",
    "zh": "中文网页内容，可以阅读。",
    "tw": "中文網頁內容，可以閱讀。",
    "ru": "Это русский текст страницы, его можно читать. ",
    "ko": "한국어 문장입니다. 읽을 수 있습니다. ",
    "el": "Ελληνικό κείμενο της σελίδας. ",
    "de": "Ein Café „so“ ist schön – für 5 €. ",
    "th": "ภาษาไทยนี้อ่านได้ ",
    "he": "עברית בדף הזה ",
}
CHARSETS = [  # language, declared, Python's codec
    ("ja", "Shift_JIS", "cp932"),
    ("ja", "x-sjis", "cp932"),
    ("ja", "euc-jp", "euc_jp"),
    ("ja", "iso-2022-jp", "iso2022_jp"),
    ("zh", "gb2312", "gb18030"),
    ("zh", "GBK", "gb18030"),
    ("tw", "big5", "big5"),
    ("ru", "windows-1251", "cp1251"),
    ("ru", "x-cp1251", "cp1251"),
    ("ru", "koi8-r", "koi8_r"),
    ("ru", "KOI8-U", "koi8_u"),
    ("ko", "euc-kr", "cp949"),
    ("ko", "ks_c_5601-1987", "cp949"),
    ("el", "iso-8859-7", "iso8859_7"),
    ("de", "iso-8859-1", "cp1252"),
    ("de", "windows-1252", "cp1252"),
    ("th", "tis-620", "cp874"),
    ("he", "iso-8859-8-i", "iso8859_8"),
    ("ja", "utf-8", "utf-8"),
    ("de", "UTF8", "utf-8"),
]


def page(text: str, head: str = "<meta charset='utf-8'>") -> str:
    body = "".join(f"<p>{text} {number}</p>" for number in range(3))
    return f"<html><head>{head}<title>t</title></head><body><article>{body}</article></body></html>"


def read(folder: Path, data: bytes | str) -> Text | Rejected:
    (folder / "a.html").write_bytes(data.encode() if isinstance(data, str) else data)
    (item,) = read_all(folder / "a.html")
    return item


def text_of(folder: Path, data: bytes | str) -> str:
    item = read(folder, data)
    assert isinstance(item, Text), item
    return item.text


@pytest.mark.parametrize(("language", "charset", "codec"), CHARSETS)
def test_the_declared_charset_is_respected_also_where_the_page_is_cut(
    tmp_path: Path, language: str, charset: str, codec: str
) -> None:
    text = TEXTS[language] * 20
    for head in (
        f"<meta charset={charset}>",
        f"<!-- <meta charset='utf-16'> --><META http-equiv='Content-Type' content='text/html; charset={charset}'>",
    ):
        data = page(text, head).encode(codec, "replace")
        expected = text.encode(codec, "replace").decode(codec).strip()
        assert expected in text_of(tmp_path, data)
        for end in range(len(data) - 120, len(data) - 112):  # inside of a character for some of them
            assert decode(data[:end]).count("\ufffd") <= 1
            assert expected[:200] in text_of(tmp_path, data[:end])
        if codec.startswith(("iso2022", "euc", "cp9", "gb", "big5")):
            continue  # without a byte in the middle, what follows has other meanings
        middle = len(data) // 2
        damaged = text_of(tmp_path, data[:middle] + data[middle + 1 :])
        assert expected[:200] in damaged


def test_a_page_that_declares_nothing(tmp_path: Path) -> None:
    data = page(TEXTS["ja"] * 20, "").encode()
    for end in range(len(data) - 120, len(data) - 112):
        assert TEXTS["ja"] in text_of(tmp_path, data[:end])
    english = page("Plain text of some length that says nothing about its charset. " * 5, "").encode()
    assert "Plain text" in text_of(tmp_path, english[:-30] + "it’s".encode()[:-2])
    assert "schön" in text_of(tmp_path, page(TEXTS["de"] * 20, "").encode("cp1252"))  # guessed


def test_a_byte_order_mark_counts_more_than_the_declared_charset(tmp_path: Path) -> None:
    for bom, codec in (
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF8, "utf-8"),
    ):
        data = bom + page(TEXTS["ja"] * 20, "<meta charset=windows-1252>").encode(codec)
        assert TEXTS["ja"] in text_of(tmp_path, data)


def test_utf_8_that_is_declared_as_something_else(tmp_path: Path) -> None:
    data = page(TEXTS["de"] * 20, "<meta charset=iso-8859-1>").encode()
    assert TEXTS["de"].strip() in text_of(tmp_path, data)
    assert TEXTS["de"].strip() in text_of(tmp_path, data[:-115])
    chance = page("一" * 300, "<meta charset=gbk>").encode("gb18030")
    assert chance.decode() and "一" in text_of(tmp_path, chance)  # its bytes are valid UTF-8


def test_a_page_that_contradicts_itself_is_refused_by_name(tmp_path: Path) -> None:
    for codec in ("cp1252", "cp1251", "gb18030"):
        text = {"cp1252": TEXTS["de"], "cp1251": TEXTS["ru"]}.get(codec, TEXTS["zh"])
        bad = one_bad([read(tmp_path, page(text * 20).encode(codec))])
        assert bad.reason == "wrong_charset" and "says utf-8, but" in bad.message


def test_only_known_charsets_in_a_declaration_count() -> None:
    for label in (b"foo", b"utf-7", b"rot13", b"hex", b"unicode_escape", b"idna", b"zlib", b"undefined"):
        assert declared_charset(b"<meta charset='" + label + b"'>") is None, label
    assert declared_charset(b"<?xml version='1.0' encoding='koi8-r'?><html>") == "koi8_r"
    assert declared_charset(b"<p>charset=koi8-r</p>") is None


@pytest.mark.parametrize(
    "forbidden", ["&#1;", "&#x1F;", "&#11;", "&#12", "&#xFFFE;", "\x00", "\x0b", "\x1b", "\ufffe", "\uffff"]
)
def test_characters_that_xml_forbids_are_dropped_and_not_the_page(tmp_path: Path, forbidden: str) -> None:
    start = "The first half of this sentence "
    text = text_of(tmp_path, page(f"{start}{forbidden}goes on, and ends here after some more words. " * 4))
    assert "sentence goes on, and ends here" in " ".join(text.split())


@pytest.mark.parametrize("tag", ["div", "span", "b", "font", "blockquote"])
def test_deep_pages_are_read_and_deeper_ones_are_named(tmp_path: Path, tag: str) -> None:
    def deep(depth: int) -> str:
        inner = f"<{tag}>" * depth + "<p>INSIDE of it all there is some text, too.</p>" + f"</{tag}>" * depth
        return page("Some text that is long enough to count as the main text of a page.", "").replace(
            "</article>", f"{inner}<p>AFTER it all there is some text, too.</p></article>"
        )

    for depth in (10, 240, 300, 1500):
        text = text_of(tmp_path, deep(depth))
        assert "INSIDE" in text and "AFTER" in text, depth
    for depth in (MAX_DEPTH + 10, 30_000):
        bad = one_bad([read(tmp_path, deep(depth))])
        assert bad.reason == "too_deep" and "nested more than 2048 deep" in bad.message
