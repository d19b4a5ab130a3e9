"""
Detects the encoding of raw bytes: UTF-8 and GB18030 are decoded, others are refused by name.

Almost any bytes decode as GB18030, also a UTF-8 line that lost a byte, or Big5, so decoding proves nothing. What tells
encodings apart is which of them gives common characters: `likely_encoding` counts points. If none is clear, the line
is rejected. An even number of bytes lost inside GB18030 text leaves other text, which no reader can tell from the
right one. chardet and charset-normalizer decide by whole files; here single lines count, because `cat` joins files of
both encodings. utils/data/raw_reader.py and utils/inference/prompt_reader.py call it.
"""

import functools
import re
import sys
from collections import Counter

from utils.common.errors import RowError, UsageError
from utils.common.terminal import one_line

MIN_NON_ASCII = 8  # non-ASCII bytes below which nothing is taken for GB18030
SAMPLE_BYTES = 1 << 16  # enough for any count below, in milliseconds
MIN_POINTS = 0.35  # for each non-ASCII byte; right text has about 1
_ASCII = bytes(range(128))
# A Chinese character or punctuation mark in UTF-8, including the quotes and dashes of U+2000 to U+203F.
_CHINESE = rb"(?:[\xe3-\xe9\xef][\x80-\xbf]|\xe2\x80)[\x80-\xbf]"
_CHINESE_UTF8 = re.compile(_CHINESE)
# Three in a row: measured once in 2,000,000 random characters of GB2312.
UTF8_RUN = re.compile(rb"(?:" + _CHINESE + rb"){3}")
_TWO_BYTES = re.compile("[\x80-\u07ff]")
# The codecs that are told apart -> their names for a person and for iconv.
NAMES = {
    "gb18030": ("GB18030", "GB18030"),
    "big5hkscs": ("Big5", "BIG5"),
    "cp932": ("Shift-JIS", "SHIFT_JIS"),
    "euc_jp": ("EUC-JP", "EUC-JP"),
    "cp949": ("EUC-KR", "EUC-KR"),
    "cp1252": ("Windows-1252 or Latin-1", "WINDOWS-1252"),
    "utf-16-le": ("UTF-16", "UTF-16LE"),
    "utf-16-be": ("UTF-16", "UTF-16BE"),
    "utf-32-le": ("UTF-32", "UTF-32LE"),
    "utf-32-be": ("UTF-32", "UTF-32BE"),
    "iso2022_jp": ("ISO-2022-JP", "ISO-2022-JP"),
}
_BOMS = (
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
# The most frequent characters of Chinese, simplified and traditional: about half of any text.
_CHINESE_COMMON = (
    "，。、：；！？（）《》“”「」的一是不了在人有我他这這中大来來上国國个個到说說们們为為子和你地出道也时時年得就那要下以生会會"
    "自着著去之过過家学學对對可她里裡裏后後小么麼心多天而能好都然没沒日于於起还還发發成事只作当當想看文无無开開手十用主行方"
    "又如前所本见見经經头頭面公同三已老从從动動两兩长長知民样樣现現分将將外但身些与與高意进進把法此实實回二理美点點月明其种"
    "種声聲全工己话話儿兒者向情部正名定女问問力机機给給等几幾很业業最间間新什打便位因重被走电電四第门門相次东東政海口使教西"
    "再平真听聽世气氣信北少关關并並内內加化由却卻代军軍产產入先山五太水万萬市眼体體别別处處总總才场場师師书書比住员員九笑性"
    "通目报報立命活难難神数數件安表原车車白应應路期叫死常提感金何更反合放做系係计計或司利受光王果亲親界及今制解各任至清物台"
    "象记記边邊共风風战戰干接许許特觉覺望直服林题題建南度统統色字请請爱愛让讓认認算论論百吃义義科怎元社术術结結指思非流每青"
    "管连連远遠资資队隊带帶花快条條变變言权權往展该該传傳近留红紅治保达達办辦运運武半必城父强強步完深区區求品士转轉量空技程"
    "告语語英基派满滿式息写寫呢识識极極令德收脸臉未持取设設始版历歷史商千片容研像找友孩站广廣改议議形委早房音火际際则則单單据"
    "據导導影失网網香似石读讀志观觀究包组組造落视視您句词詞描述翻译譯下列以下输輸出根据創创建解释釋谢謝吗嗎"
)
_JAPANESE_COMMON = (
    "、。「」ー・日一国会人年大十二本中長出三同時政事自行社見月分議後前民生連発間対上部東者地合市業内相方"
)
_KANA = (0x3041, 0x30FE)
_KOREAN_COMMON = (
    "이다는에의가을로고하를지서한은도기사인그리자시라어나대아정수일부스제보해전과들상으원주장여세니습오있와게안성거조만구선공무신동적유"
    "비용면마경위진소관명할까우모드야요입계분실방국년때것했된되없않었였음않문화"
)
_PLAIN = {*map(chr, range(0x20, 0x7F)), *"\t\r\n"}
_LATIN_COMMON = "éèêëàâäáãåæçíìîïñóòôöõøœúùûüýßÉÈÀÂÄÁÅÆÇÍÎÑÓÖØÚÜ"
_NON_ASCII = re.compile(rb"[\x80-\xff]")
# A letter of a language with accents: not next to another non-ASCII byte.
_ALONE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")


def _level(codec: str, first: int, last: int, trails: range) -> set[str]:
    """The characters of a block of two-byte codes."""
    codes = (bytes((lead, trail)) for lead in range(first, last + 1) for trail in trails)
    return {char for code in codes for char in code.decode(codec, "ignore")}


@functools.cache
def _points(codec: str) -> dict[str, int]:
    """
    Points of each character: 3 for the most frequent, 1 for common.

    Common characters are the first level of the language's standard: those in daily use, in the order of readings or
    strokes. Others have no points.
    """
    high = range(0xA1, 0xFF)
    chinese = (
        _level("gb2312", 0xB0, 0xD7, high)
        | _level("big5", 0xA4, 0xC6, range(0x40, 0x7F))
        | _level("big5", 0xA4, 0xC6, high)
    )
    japanese = _level("euc_jp", 0xB0, 0xCF, high)
    kana = {chr(code) for code in range(_KANA[0], _KANA[1] + 1)}
    levels, common = {
        "gb18030": (chinese | kana, {*_CHINESE_COMMON}),  # kana have the same codes in EUC-JP, where they are common
        "big5hkscs": (chinese, {*_CHINESE_COMMON}),
        "cp932": (japanese, {*_JAPANESE_COMMON} | kana),
        "euc_jp": (japanese, {*_JAPANESE_COMMON} | kana),
        "cp949": (_level("euc_kr", 0xB0, 0xC8, high), {*_KOREAN_COMMON}),
    }[codec]
    return dict.fromkeys(levels, 1) | dict.fromkeys(common, 3)


def likely_encoding(data: bytes) -> str | None:
    """
    The codec, one of NAMES, in which bytes give the most points.

    None if all give few. The bytes are not UTF-8.

    A character gives 3, 1 or no points (`_points`), undecodable bytes cost 3. For Windows-1252 an accented letter
    between letters without accents gives 3, and a non-ASCII byte next to another costs 3. Right text has about 2
    points a character, text in the wrong codec hardly 1. Texts of a few characters may be taken for another encoding,
    most of all names and rare words.
    """
    start = _NON_ASCII.search(data)
    data = data[start.start() if start else 0 :][:SAMPLE_BYTES]
    non_ascii = len(data.translate(None, _ASCII))
    alone = _ALONE.findall(data)
    letters = sum(3 for byte in alone if byte.decode("cp1252", "replace") in _LATIN_COMMON)
    points = {}
    for codec in ("gb18030", "big5hkscs", "cp932", "euc_jp", "cp949"):
        worth = _points(codec)
        counts = Counter(data.decode(codec, "replace"))
        points[codec] = sum(worth.get(char, 0) * count for char, count in counts.items()) - 3 * counts["\ufffd"]
    points["gb18030"] += 1  # breaks the tie of texts that are too short to tell
    points["cp1252"] = letters - 3 * (non_ascii - len(alone))
    best = max(points, key=points.__getitem__)
    return best if points[best] >= MIN_POINTS * non_ascii else None


def wide_encoding(data: bytes) -> str | None:
    """
    UTF-16, UTF-32 or ISO-2022-JP as a codec of NAMES, else None.

    They have a byte order mark, zeros or escapes.
    """
    for mark, codec in _BOMS:
        if data.startswith(mark):
            return codec
    if b"\x1b$B" in data[:SAMPLE_BYTES] or b"\x1b$@" in data[:SAMPLE_BYTES]:
        return "iso2022_jp"
    if b"\0" not in data[:SAMPLE_BYTES]:
        return None
    data, worth, points = data[:SAMPLE_BYTES], _points("gb18030"), {}
    for codec, size in (("utf-16-le", 2), ("utf-16-be", 2), ("utf-32-le", 4), ("utf-32-be", 4)):
        text = data[: len(data) // size * size].decode(codec, "replace")
        known = sum(count for char, count in Counter(text).items() if char in _PLAIN or worth.get(char))
        points[codec] = known / max(len(text), 1)
    best = max(points, key=points.__getitem__)
    return best if points[best] > 0.5 else None


def detect_encoding(data: bytes, path: str) -> str:
    """
    Encoding of the file that begins with `data`: "utf-8" or "gb18030".

    It tells apart UTF-8, GB18030, Big5, Shift-JIS, EUC-JP, EUC-KR, Windows-1252 and Latin-1 (as one), UTF-16 and
    UTF-32; the last two without a byte order mark if there is an ASCII character, such as a newline. Cyrillic and
    other encodings give few points: their rows are rejected without a name. It does not tell apart several encodings
    in one file other than UTF-8 and GB18030, and may be wrong about texts of 4 characters or fewer.

    Raises:
        UsageError: the file is in another encoding, which the message names.
    """
    codec = wide_encoding(data)
    if codec is None and is_not_utf8(data):
        codec = likely_encoding(data)
        if codec == "gb18030":
            return codec if _is_whole(data) else "utf-8"
    if codec is None:
        return "utf-8"
    name, iconv = NAMES[codec]
    raise UsageError(
        f"{path} is neither UTF-8 nor GB18030 but, by its characters, {name}: convert it with "
        f"`iconv -f {iconv} -t UTF-8 {path} > NEW`"
    )


def is_not_utf8(data: bytes) -> bool:
    """
    Whether bytes are in another encoding than UTF-8, rather than UTF-8 with bytes lost.

    In another encoding few non-ASCII bytes form UTF-8 characters of three bytes. They form many of two bytes by
    chance, but a UTF-8 text in two-byte letters that lost a byte consists of little else.
    """
    non_ascii = len(data.translate(None, _ASCII))
    if non_ascii < MIN_NON_ASCII:
        return False
    text = data.decode("utf-8", "ignore")
    two_bytes = 2 * len(_TWO_BYTES.findall(text))
    more_bytes = len(text.encode()) - (len(data) - non_ascii) - two_bytes
    return more_bytes < 0.4 * non_ascii and two_bytes + more_bytes < 0.8 * non_ascii


def _is_whole(data: bytes) -> bool:
    """Whether nearly all non-ASCII bytes form GB18030 characters."""
    return data.decode("gb18030", "replace").count("\ufffd") <= len(data.translate(None, _ASCII)) / 20 + 1


def decode_line(line: bytes, encoding: str, path: str) -> str | RowError:
    """
    Decode a line in its file's encoding, or in the other one.

    The other one is tried because `cat` joins files of both, and taken if all of the line points there.

    A UTF-8 line that lost bytes would often decode as GB18030 to other characters; but most of it is still UTF-8.

    Returns:
        The text, or the error that rejects the line.
    """
    codec = None
    if encoding == "utf-8":
        if (text := decode_strict(line, encoding)) is not None:
            return text
        codec = likely_encoding(line) if is_not_utf8(line) else None
        if codec == "gb18030" and _is_whole(line) and (text := decode_strict(line, codec)) is not None:
            warn_once(f"{path}: reading some lines as GB18030; output is UTF-8")
            return text
    else:
        if len(_CHINESE_UTF8.findall(line)) >= 2 and (text := decode_strict(line, "utf-8")) is not None:
            return text
        if (text := decode_strict(line, encoding)) is not None:
            return text
    seems = f", but {NAMES[codec][0]}, by their characters" if codec not in (None, "gb18030") else ""
    return RowError(f"bytes that are not {encoding.upper()}{seems}")


def decode_text(data: bytes, path: str) -> str:
    """
    Decode a whole file, UTF-8 (with or without a BOM) or GB18030.

    A line about GB18030 goes to stderr.

    Raises:
        UsageError: another encoding, or a zero byte.
    """
    detect_encoding(data, path)
    text = decode_line(data.removeprefix(b"\xef\xbb\xbf"), "utf-8", path)
    if isinstance(text, RowError):
        raise UsageError(f"{path}: {text}: convert it to UTF-8")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageError(f"{path}:{line}: a zero byte, which no text has: remove it, or convert the file to UTF-8")
    return text


_printed_warnings: set[str] = set()


def warn_once(message: str) -> None:
    """Print a line on stderr, unless this process has printed it before."""
    if message not in _printed_warnings:
        _printed_warnings.add(message)
        print(one_line(message), file=sys.stderr)


def decode_strict(data: bytes, encoding: str) -> str | None:
    """The text, or None if it is not in that encoding."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if encoding == "gb18030" and UTF8_RUN.search(data) else text
