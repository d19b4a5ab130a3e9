"""tools/evaluate.py: its scores are those of the libraries, and its reports show them."""

import json
import re

import jieba
import pytest
import sacrebleu
from conftest import GOLDEN, ROOT, TINY
from markdown_it import MarkdownIt
from rouge_score.rouge_scorer import RougeScorer

from tools.evaluate import SHOWN, check_failures, markdown, page, plain, plot
from tools.scores import ROUGE, JiebaWords, score_answers
from utils.common.errors import RunError
from utils.common.terminal import escape_controls

REFERENCES = ["今天天气很好", "我喜欢吃苹果。", "老王昨天在家里喝茶", "ChatGLM is a model"]
ANSWERS = ["今天天气很好", "我不喜欢吃香蕉!", "老王在家", ""]


def as_answers(texts):
    return [
        {"answer": text or None, "finish_reason": "stop" if text else "error", "answer_tokens": 3} for text in texts
    ]


def test_scores_are_the_libraries_own():
    scores = score_answers(as_answers(ANSWERS), REFERENCES)
    bleu = sacrebleu.corpus_bleu(ANSWERS, [REFERENCES], tokenize="zh").score
    assert scores["bleu4"].value == bleu > 0
    assert scores["chrf"].value == sacrebleu.corpus_chrf(ANSWERS, [REFERENCES]).score > 0
    scorer = RougeScorer(list(ROUGE), tokenizer=JiebaWords())
    for name in ROUGE:
        each = [scorer.score(b, a)[name].fmeasure for a, b in zip(ANSWERS, REFERENCES, strict=True)]
        assert scores[name].value == pytest.approx(100 * sum(each) / 4)
    ours, theirs = set(jieba.lcut(ANSWERS[2])), set(jieba.lcut(REFERENCES[2]))
    f1 = 2 * len(ours & theirs) / (len(ours) + len(theirs))  # no word occurs twice in either
    assert scorer.score(REFERENCES[2], ANSWERS[2])["rouge1"].fmeasure == pytest.approx(f1)
    assert scores["exact_match"].value == 25 and scores["stopped"].value == 75
    for score in scores.values():
        assert score.low <= score.value <= score.high or score.value == pytest.approx(score.low)


def test_intervals_come_from_the_rows():
    same = score_answers(as_answers(REFERENCES), REFERENCES)
    assert all(same[name].low == pytest.approx(100) for name in ("exact_match", "chrf", *ROUGE))
    mixed = [REFERENCES[0]] * 50 + ["错"] * 50
    few = score_answers(as_answers(mixed[25:75:5]), [REFERENCES[0]] * 10)["exact_match"]
    many = score_answers(as_answers(mixed), [REFERENCES[0]] * 100)["exact_match"]
    assert 35 < many.low < 50 < many.high < 65 and few.high - few.low > 2 * (many.high - many.low)
    assert many == score_answers(as_answers(mixed), [REFERENCES[0]] * 100)["exact_match"]


def test_report(run_script, tmp_path):
    adapter = GOLDEN / "adapters" / "v1" / "qkv"
    base = GOLDEN / "chatglm-6b-tiny"
    result = run_script(
        f"tools/evaluate.py --model_name_or_path {base} --adapter_path {adapter} "
        f"--input_path data/sample.heldout.json --max_rows 5 --max_new_tokens 6 --samples 3 --output_dir {tmp_path}"
    ).check()
    summary = json.loads(result.out.splitlines()[-1])
    assert summary["rows"] == 5 and list(summary["scores"]) == ["base", "qkv"]
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["row"], row["system"]) for row in answers] == [
        (i, name) for i in range(5) for name in ("base", "qkv")
    ]
    assert any(answers[2 * i]["answer"] != answers[2 * i + 1]["answer"] for i in range(5))
    scores = json.loads((tmp_path / "scores.json").read_text())
    texts = [row["answer"] for row in answers if row["system"] == "qkv"]
    targets = [row["target"] for row in answers if row["system"] == "qkv"]
    assert scores["qkv"]["chrf"]["value"] == sacrebleu.corpus_chrf(texts, [targets]).score
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for text in (report, page):
        assert f"{scores['qkv']['chrf']['value']:.2f} [" in text and targets[0] in text and targets[3] not in text
    assert "data:image/png;base64," in page and not re.search(r'(src|href)="(?!data:)', page)


HOSTILE = (
    "![x](http://evil.example/a.png)",
    "[x](javascript:alert(1)) [y]: http://evil.example",
    "<img src=http://evil.example/a.png onerror=alert(1)> <b>&amp;</b> <!-- a -->",
    "<http://evil.example> http://evil.example www.evil.example //evil.example a@evil.example ftp://evil.example",
    "a | b \\| c\n| --- | --- |\n# d\r\n- e",
    "`<b>` ``` ~~~ **a** _b_ ~~c~~ $x$ $$y$$ {{ z }} [^1] H~2~O",
    "\\[a](b) \\<i> \\\\",
    '</td></table><script>alert(1)</script> \' onload="x"',
    "\x1b[2J\x00\u202e\x85\x0b",
    "$a$ $\\frac{$",
    "\x24\\notacommand$_",
)


def test_a_report_shows_texts_and_runs_none():
    """A Markdown parser sees only text and line breaks in answers, names and paths."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for text in HOSTILE:
        tokens = [token for token in parser.parseInline(plain(text))[0].children if token.content != "<br>"]
        assert {token.type for token in tokens} <= {"text", "text_special"}, text
        assert "".join(token.content for token in tokens) == escape_controls(text.replace("\r\n", "\n")).replace(
            "\n", ""
        )
    assert not re.search(r"://|www\.|\.[a-z]|@", "".join(map(plain, HOSTILE)))
    assert plain("答案: 3.14, 100% (a)!") == "答案: 3.14, 100% (a)!"


def test_hostile_reports():
    """Whole reports and figures whose adapters and files have HOSTILE names."""
    names = ["base", *HOSTILE, "_hidden"]
    answers = {name: as_answers(REFERENCES) for name in names}
    scores = {name: score_answers(as_answers(ANSWERS), REFERENCES) for name in names}
    samples = [["prompt", "target", *names], *[[text] * (2 + len(names)) for text in HOSTILE]]
    figure = plot(scores, answers)
    assert figure.startswith(b"\x89PNG")
    report = markdown(HOSTILE[0], scores, samples, "scores.png")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert re.findall(r"<(?:img|a|script)[^>]*>", html) == ['<img src="scores.png" alt="scores and lengths" />']
    rows = [line for line in report.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {len(names) + 2, len(names) + 3}
    assert len(rows) == len(SHOWN) + len(HOSTILE) + 4  # heads and the lines below them
    document = page(HOSTILE[7], scores, samples, figure)
    assert "default-src 'none'" in document and "<script" not in document and document.count("<img") == 1
    assert not set("\x00\x1b\u202e") & set(report + document)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--input_path nowhere.json", "nowhere.json"),
        ("--input_path data/sample_prompts.jsonl", "every row needs a prompt and a target"),
        ("--input_path data/sample.heldout.json --max_new_tokens 0", "--max_new_tokens 0"),
        ("--input_path data/sample.heldout.json --adapter_path a/x b/x", "must differ"),
        ("--input_path answers.jsonl --output_dir .", "answers.jsonl is an input"),
    ],
)
def test_wrong_use(run_script, flags, words, tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "answers.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    result = run_script(f"tools/evaluate.py --model_name_or_path {TINY} {flags}", cwd=tmp_path)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err


def test_most_answers_failing_is_a_failure():
    answer, error = {"finish_reason": "stop"}, {"finish_reason": "error", "error": "no memory"}
    check_failures({"base": [answer, error]})
    with pytest.raises(RunError, match="2 of 3 rows have no answer of a, the first: no memory"):
        check_failures({"base": [answer] * 3, "a": [answer, error, error]})


def test_requirements_are_what_runs_here():
    from importlib.metadata import version

    pins = re.findall(r"^(\S+)==(\S+)", (ROOT / "tools" / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert len(pins) == 4 and all(version(name) == pinned for name, pinned in pins)
