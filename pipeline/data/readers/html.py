"""Pages: their characters by the charset that they declare, then their main text (trafilatura).

trafilatura guesses the charset of bytes that are not UTF-8, and one damaged byte is enough to get a page of another alphabet.
So bytes are decoded here: by the byte order mark, as UTF-8 if they are UTF-8, or by the declared charset, where a damaged
character is one U+FFFD. Only a page that declares nothing is guessed. A page that contradicts what it declares is refused.

Python's codecs are called by the names of the WHATWG Encoding Standard (https://encoding.spec.whatwg.org/#names-and-labels):
browsers read `iso-8859-1` as windows-1252, `gb2312` as GB 18030, and so do pages' authors.
"""

from __future__ import annotations

import codecs
import re
from encodings.aliases import aliases

HEAD = 1 << 16  # bytes that are searched for a declared charset
TOLERATED = 0.02  # of the characters outside of ASCII may be damaged; and one always may
DECLARED = re.compile(
    rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?\s*([\w.:-]+)|<\?xml\b[^>]*?\bencoding\s*=\s*["']([\w.:-]+)""", re.IGNORECASE
)
COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
LABELS = {  # that Python does not know
    "unicode": "utf-8",
    "windows-949": "cp949",
    "windows-874": "cp874",
    "koi8-u": "koi8_u",
    "koi8-ru": "koi8_u",
    "iso-8859-6-i": "iso8859_6",
    "iso-8859-8-i": "iso8859_8",
    "iso-8859-6-e": "iso8859_6",
    "iso-8859-8-e": "iso8859_8",
}
WIDER = {  # Python's name of a codec -> the one that browsers use for its labels
    "ascii": "cp1252",
    "latin_1": "cp1252",
    "iso8859_9": "cp1254",
    "iso8859_11": "cp874",
    "tis_620": "cp874",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    **dict.fromkeys(("utf_16", "utf_16_le", "utf_16_be", "utf_8"), "utf-8"),  # a page that can say so is not UTF-16
}
NOT_CHARSETS = {
    "utf_7",
    "base64_codec",
    "bz2_codec",
    "hex_codec",
    "quopri_codec",
    "rot_13",
    "uu_codec",
    "zlib_codec",
    "mbcs",
}
SEVEN_BITS = ("iso2022", "hz")  # their bytes are ASCII, so valid UTF-8 too
SEVERAL_BYTES = ("cp932", "cp949", "gb18030", "big5hkscs", "euc_jp", "johab")
MAX_DEPTH = 2048  # of libxml2, which stops at 256 unless it is told that a tree may be huge
REFERENCE = re.compile(r"&#(?:[xX]([0-9a-fA-F]{1,8})|([0-9]{1,9}));?")
NO_XML = frozenset((*range(1, 9), 11, 12, *range(14, 32), 0xFFFE, 0xFFFF))  # code points that XML forbids, so lxml too


class PageProblem(Exception):
    """Why a page gives no text. reason: what it is counted under."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


def main_text(data: bytes) -> str | None:
    """The main text of a page; None if there is none. Raises PageProblem for a page that cannot be read rightly."""
    import trafilatura
    from trafilatura.utils import HTML_PARSER, handle_compressed_file, load_html

    page = decode(handle_compressed_file(data))
    if "&#" in page:
        page = REFERENCE.sub(_without_forbidden, page)
    text: str | None = trafilatura.extract(page, include_comments=False)
    load_html(page)
    if not _is_too_deep(HTML_PARSER):
        return text
    from lxml.html import HTMLParser, fromstring  # type: ignore[import-untyped]

    parser = HTMLParser(
        collect_ids=False,
        default_doctype=False,
        encoding="utf-8",
        remove_comments=True,
        remove_pis=True,
        huge_tree=True,
    )
    tree = fromstring(page.encode("utf-8", "surrogatepass"), parser=parser)
    if _is_too_deep(parser):
        raise PageProblem(
            "too_deep", f"its elements are nested more than {MAX_DEPTH} deep, which libxml2 does not read"
        )
    text = trafilatura.extract(tree, include_comments=False)
    return text


def decode(data: bytes) -> str:
    """The characters of a page. Raises PageProblem if its bytes are not of the charset that it declares."""
    for bom, name in BOMS.items():
        if data.startswith(bom):
            return _checked(data[len(bom) if name != "utf-8" else 0 :], name, "by its first bytes")
    declared = declared_charset(data)
    if declared and declared.startswith(SEVEN_BITS):
        return _checked(data, declared, "it says")
    text, damaged, others = _decoded(data, "utf-8")
    if not damaged:
        # Two bytes of these charsets can look like one character of UTF-8; then all look like the first 2,048 characters.
        by_chance = declared in SEVERAL_BYTES and others and max(text) < "\u0800" and not _decoded(data, declared)[1]
        return _decoded(data, str(declared))[0] if by_chance else text
    if damaged <= TOLERATED * others or (declared in (None, "utf-8") and _is_one_cut(data, damaged, others)):
        return text
    if declared:
        return _checked(data, declared, "it says")
    from trafilatura.utils import decode_file

    guessed: str = decode_file(data)
    return guessed


def declared_charset(data: bytes) -> str | None:
    """Python's name of the charset that a page declares, as browsers understand it; None without a known one."""
    for found in DECLARED.finditer(COMMENT.sub(b"", data[:HEAD])):
        label = (found[1] or found[2]).decode("ascii", "replace").lower().removeprefix("x-")
        name = re.sub(r"[^a-z0-9]+", "_", label).strip("_")
        name = LABELS.get(label) or aliases.get(name, name)
        name = WIDER.get(name, name)
        if name not in NOT_CHARSETS and (name in set(aliases.values()) or name in LABELS.values() or name == "utf-8"):
            return name
    return None


def _checked(data: bytes, charset: str, source: str) -> str:
    text, damaged, others = _decoded(data, charset)
    if damaged > max(1, TOLERATED * others):
        problem = (
            f"{source} {charset}, but {damaged:,} of its characters are not; correct its charset, or convert it (iconv)"
        )
        raise PageProblem("wrong_charset", problem)
    return text


def _decoded(data: bytes, charset: str) -> tuple[str, int, int]:
    """(text, damaged characters in it, intact ones outside of ASCII)."""
    text = data.decode(charset, "replace")
    damaged = text.count("\ufffd") - (data.count("\ufffd".encode()) if charset == "utf-8" else 0)
    return text, damaged, len(text) - len(text.encode("ascii", "ignore")) - damaged


def _is_one_cut(data: bytes, damaged: int, others: int) -> bool:
    """Whether the one damaged character of a page is a cut one of UTF-8: among others, or at the page's end."""
    if damaged != 1:
        return False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return others > 0 or decoder.decode(data).count("\ufffd") == 0


def _without_forbidden(found: re.Match[str]) -> str:
    return "" if (int(found[1], 16) if found[1] else int(found[2])) in NO_XML else found[0]


def _is_too_deep(parser: object) -> bool:
    log = parser.error_log  # type: ignore[attr-defined]  # lxml has no types
    return any(entry.type_name == "ERR_RESOURCE_LIMIT" and "depth" in entry.message for entry in log)
