"""Encodings that are decoded, and those that are refused by name; JSON objects that spread over lines."""

import gzip
import json

import pytest

from utils.common.errors import RowError, UsageError
from utils.data.encodings import decode_text
from utils.data.raw_reader import BLOCK_BYTES, input_paths, read_json_rows

CHINESE = ("请把下面的句子改写成一个问题。", "今天天气怎么样？", "他昨天在图书馆看书", "好的，谢谢！", "春风又绿江南")
TRADITIONAL = (
    "請把下面的句子改寫成一個問題。",
    "今天天氣怎麼樣？",
    "他昨天在圖書館看書",
    "臺灣的首都在哪裡？",
    "謝謝您",
)
JAPANESE = ("次の文を英語に翻訳してください。", "今日の天気はどうですか？", "図書館で本を読みました", "ありがとう")
KOREAN = ("다음 문장을 영어로 번역해 주세요.", "오늘 날씨는 어때요?", "도서관에서 책을 읽었습니다", "감사합니다")
FRENCH = ("Où est la bibliothèque ? Très près.", "Traduisez : été, hiver, forêt", "Éléments déjà créés", "À bientôt")
GERMAN = ("Übersetze den Satz ins Französische.", "Die Straße ist für Fußgänger gesperrt", "schöne Grüße")


def rows_of(texts):
    return [{"instruction": text, "output": texts[i - 1]} for i, text in enumerate(texts)]


def lines_of(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(tmp_path, data, block_bytes=BLOCK_BYTES):
    """The values of a file, and its errors with their lines."""
    (tmp_path / "rows.json").write_bytes(data)
    numbered = list(read_json_rows(tmp_path / "rows.json", block_bytes))
    return [value for _, value in numbered if not isinstance(value, RowError)], [
        (line, str(value)) for line, value in numbered if isinstance(value, RowError)
    ]


@pytest.mark.parametrize(
    "texts, codec, name, iconv",
    [
        (TRADITIONAL, "big5", "Big5", "BIG5"),
        (TRADITIONAL, "cp950", "Big5", "BIG5"),
        (JAPANESE, "shift_jis", "Shift-JIS", "SHIFT_JIS"),
        (JAPANESE, "euc_jp", "EUC-JP", "EUC-JP"),
        (JAPANESE, "iso2022_jp", "ISO-2022-JP", "ISO-2022-JP"),
        (KOREAN, "euc_kr", "EUC-KR", "EUC-KR"),
        (FRENCH, "cp1252", "Windows-1252 or Latin-1", "WINDOWS-1252"),
        (GERMAN, "latin-1", "Windows-1252 or Latin-1", "WINDOWS-1252"),
        (CHINESE, "utf-16", "UTF-16", "UTF-16LE"),
        (CHINESE, "utf-16-le", "UTF-16", "UTF-16LE"),
        (CHINESE, "utf-16-be", "UTF-16", "UTF-16BE"),
        (CHINESE, "utf-32", "UTF-32", "UTF-32LE"),
        (CHINESE, "utf-32-be", "UTF-32", "UTF-32BE"),
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path, texts, codec, name, iconv):
    words = f"is neither UTF-8 nor GB18030 but, by its characters, {name}: .*iconv -f {iconv} -t UTF-8"
    rows = rows_of(texts)
    for text in (lines_of(rows), lines_of(rows[:2]), json.dumps(rows, ensure_ascii=False), "\n".join(texts)):
        for data in (text.encode(codec), gzip.compress(text.encode(codec))):
            with pytest.raises(UsageError, match=words):
                read(tmp_path, data)
    with pytest.raises(UsageError, match=words):
        input_paths([f"{tmp_path}/*.json"])
    with pytest.raises(UsageError, match=words):
        decode_text("\n".join(texts).encode(codec), "rows.txt")


@pytest.mark.parametrize("texts", [CHINESE, TRADITIONAL])
@pytest.mark.parametrize("codec", ["gbk", "gb18030"])
def test_chinese_in_gb18030_is_read(tmp_path, texts, codec):
    """Also short, traditional, and mixed with other languages, whose characters GB18030 has."""
    rows = rows_of(texts)
    for some in (rows, *([row] for row in rows)):
        assert read(tmp_path, lines_of(some).encode(codec)) == (some, [])
        assert decode_text(lines_of(some).encode(codec), "rows.txt") == lines_of(some)
    mixed = rows_of([*texts, "翻译：ありがとう", "ёлка 是什么意思？", "naive 123", "①②③ ㈠ №5", "龘靐齉"])
    assert read(tmp_path, lines_of(mixed).encode(codec)) == (mixed, [])


def test_a_line_in_another_encoding_is_named(tmp_path):
    rows = rows_of(CHINESE)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    bad = [(TRADITIONAL, "big5", "Big5"), (JAPANESE, "shift_jis", "Shift-JIS"), (FRENCH, "cp1252", "Windows-1252")]
    data = b"".join(line.encode() + b"\n" for line in lines * 10)
    for texts, codec, name in bad:
        line = json.dumps({"input": "".join(texts), "target": texts[0]}, ensure_ascii=False).encode(codec)
        good, errors = read(tmp_path, data + line)
        assert good == rows * 10 and len(errors) == 1 and errors[0][0] == 51
        assert errors[0][1].startswith(f"bytes that are not UTF-8, but {name}")


def test_cyrillic_is_no_chinese(tmp_path):
    text = lines_of([{"input": "Переведите предложение на английский язык.", "target": "Сегодня хорошая погода"}] * 3)
    good, bad = read(tmp_path, text.encode("cp1251"))
    assert not good and len(bad) == 3


def test_zeros_are_no_text():
    with pytest.raises(UsageError, match="rows.txt:2: a zero byte"):
        decode_text("一\n二\0\n".encode(), "rows.txt")


ROWS = [{"instruction": f"问题{i}\n？", "input": "", "output": f'"{i}" }}]', "system": "短"} for i in range(30)]
PRETTY = [json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS]
CHATS = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "好"}]} for i in range(9)]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(PRETTY),
        "\r\n\r\n".join(text.replace("\n", "\r\n") for text in PRETTY),
        ",\n".join(PRETTY),
        "".join(PRETTY),
        "\n".join(PRETTY[:20]) + "\n" + lines_of(ROWS[20:]),
        "\n".join(PRETTY[:20]) + "\n" + json.dumps(ROWS[20:], indent=1),
        *(json.dumps({name: ROWS}, indent=2, ensure_ascii=False) for name in ("data", "train", "rows", "examples")),
        json.dumps({"data": ROWS}),
        json.dumps(
            {"version": "1.0", "info": {"a": [1, "]"]}, "data": ROWS, "licence": None, "tags": ["x"]}, indent=1
        ),
        json.dumps({"data": ROWS[:9]}) + "\n" + json.dumps({"data": ROWS[9:]}) + "\n",
        json.dumps({"data": ROWS[:9]}, indent=1) + "\n" + lines_of(ROWS[9:]),
        lines_of(ROWS).replace('{"instruction"', '{\n"instruction"', 1),
    ],
)
@pytest.mark.parametrize("block_bytes", [700, BLOCK_BYTES])
def test_rows_spread_over_lines(tmp_path, text, block_bytes):
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode(), gzip.compress(text.encode()), text.encode("gb18030")):
        assert read(tmp_path, data, block_bytes) == (ROWS, [])


def test_chats_spread_over_lines(tmp_path):
    """Their lists of messages are no lists of rows."""
    for text in ("\n".join(json.dumps(row, indent=4) for row in CHATS), json.dumps({"data": CHATS}), lines_of(CHATS)):
        assert read(tmp_path, text.encode()) == (CHATS, [])


def test_lines_of_rows_spread_over_lines(tmp_path):
    (tmp_path / "rows.json").write_text("\n" + "\n".join(PRETTY), encoding="utf-8")
    length = PRETTY[0].count("\n") + 1
    assert [line for line, _ in read_json_rows(tmp_path / "rows.json")] == [2 + i * length for i in range(30)]


def test_a_broken_object_costs_no_other(tmp_path):
    good, bad = read(tmp_path, "\n".join([*PRETTY[:5], PRETTY[5][:-20], *PRETTY[6:]]).encode())
    assert good == ROWS[:5] + ROWS[6:] and len(bad) == 1
    whole = json.dumps({"data": ROWS}, indent=1)
    good, bad = read(tmp_path, whole[:-60].encode())
    assert good == ROWS[:-1] and len(bad) == 1
    for broken in ('{"input": "a", "tar', '{"input": "a",', '{"input": "a"', "{"):  # lines, the first cut
        good, bad = read(tmp_path, f"{broken}\n{lines_of(CHATS)}".encode())
        assert good == CHATS and [line for line, _ in bad] == [1]


def test_a_second_list_of_rows_is_not_mixed_in(tmp_path):
    text = json.dumps({"train": ROWS, "test": ROWS[:3], "note": "x"}, indent=1) + "\n" + lines_of(CHATS)
    good, bad = read(tmp_path, text.encode())
    assert good == ROWS + CHATS and len(bad) == 1 and '"test" is a second list' in bad[0][1]
