"""tools/evaluate.py: its scores are those of the libraries, and its reports show them."""

import json
import re
import shutil
from html import unescape

import jieba
import pytest
import sacrebleu
import torch
from conftest import GOLDEN, ROOT, TINY
from markdown_it import MarkdownIt
from rouge_score.rouge_scorer import RougeScorer

from tools.evaluate import OUTPUTS, check_failures
from tools.evaluation_report import HIGHER_IS_BETTER, SHOWN, Evaluation, markdown, page, plain, write_report
from tools.scores import ROUGE, JiebaWords, score_answers
from utils.common.errors import RunError
from utils.common.terminal import escape_controls

REFERENCES = ["今天天气很好", "我喜欢吃苹果。", "老王昨天在家里喝茶", "ChatGLM is a model"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
    report, document = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    rows = json.loads(re.search(r'id="data">(.*?)</script>', document)[1])
    assert [row[1] for row in rows] == targets and [cell[0] for row in rows for cell in row[2]] == [
        row["answer"] for row in answers
    ]
    assert targets[0] in report and targets[3] not in report  # --samples 3
    assert (
        f"{scores['qkv']['chrf']['value']:.2f} [" in report and f"{scores['qkv']['chrf']['value']:.2f} <" in document
    )
    for text in ("tools/evaluate.py --model_name_or_path", f"torch {torch.__version__}", "at most 6 tokens"):
        assert text in document
    assert re.search(r"<dt>date</dt><dd>\d{4}-\d\d-\d\d", document)
    assert not re.search(r'(src|href|srcset)="(?!data:)', document) and "http" not in document.replace(
        "http-equiv", ""
    )
    assert set(OUTPUTS) == {path.name for path in tmp_path.iterdir()}
    assert "pkg_resources" not in result.err and "prefix dict" not in result.err
    assert "report.html" in result.out and "python tools/chat.py" in result.out


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


def evaluation_of(texts, prompts):
    """Return an evaluation of the systems' `texts`, whose prompts and targets are `prompts`."""
    answers = {name: as_answers(each) for name, each in texts.items()}
    for each in answers.values():
        for answer, prompt in zip(each, prompts, strict=True):
            answer["prompt"] = prompt
    scores = {name: score_answers(each, prompts) for name, each in answers.items()}
    return Evaluation({"rows": HOSTILE[0]}, {"command": HOSTILE[7]}, list(prompts), answers, scores)


def test_hostile_reports(tmp_path):
    """Whole reports and figures whose adapters, files and rows have HOSTILE texts."""
    names = ["base", *HOSTILE, "_hidden"]
    evaluation = evaluation_of(dict.fromkeys(names, HOSTILE), HOSTILE)
    write_report(evaluation, tmp_path, len(HOSTILE))
    for figure in ("scores.png", "lengths.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    report, document = markdown(evaluation, len(HOSTILE)), page(evaluation)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    assert re.findall(r"<(?:img|a|script)[^>]*>", html) == [
        '<img src="scores.png" alt="scores" />',
        '<img src="lengths.png" alt="lengths" />',
    ]
    rows = [line for line in report.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {len(names) + 2, len(names) + 3}
    assert len(rows) == len(SHOWN) + len(HOSTILE) + 4  # heads and the lines below them
    assert "default-src 'none'" in unescape(document)
    assert document.count("<script") == 2 == document.count("</script")
    assert document.count("<img") == 2
    assert not set("\x00\x1b\u202e") & set(report + document)


def test_the_best_is_marked():
    """In both reports, for each metric that has a best; not where all are equal."""
    evaluation = evaluation_of({"base": ANSWERS, "good": REFERENCES}, REFERENCES)
    assert all(evaluation.best(key) == {"good"} for key in HIGHER_IS_BETTER)
    assert not evaluation.best("answer_characters")
    assert "**100.00 [" in markdown(evaluation, 1) and markdown(evaluation, 1).count("**") == 2 * 7
    assert page(evaluation).count('<td class="best">') == 7
    same = evaluation_of({"base": ANSWERS, "again": ANSWERS}, REFERENCES)
    assert not any(same.best(key) for key in SHOWN)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path):
    """HTML in rows is text; differences are marked; filters and order choose rows; 2,000 rows open at once."""
    from playwright.sync_api import sync_playwright

    prompts = ["<script>document.title = 'run'</script><b>x</b>", "今天天气好", *["第一行\n第二行"] * 1998]
    good = [prompts[0], "今天天空好", *prompts[2:]]
    evaluation = evaluation_of({"base": ["错误的回答", *good[1:]], "lora": good}, prompts)
    (tmp_path / "report.html").write_text(page(evaluation))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        faults = []
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text))
        tab.goto(f"file://{tmp_path}/report.html")
        assert tab.title() == "Evaluation: base, lora" and tab.locator("#rows b, #rows script").count() == 0
        assert tab.locator("article").first.inner_text().count(prompts[0]) == 3  # prompt, target, lora
        assert [mark.inner_text() for mark in tab.locator("article").nth(1).locator("mark").all()] == ["空"] * 2
        assert [mark.inner_text() for mark in tab.locator("article").nth(1).locator("del").all()] == ["气"] * 2
        assert tab.locator("article").count() == 50 and tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        for control, value, count in (("which", "wrong", 1), ("which", "different", 1), ("which", "all", 2000)):
            tab.select_option(f"#{control}", value)
            assert tab.inner_text("#count") == f"{count} of 2000 rows"
        tab.select_option("#order", "low")
        assert "row 2\n" in tab.locator("article").first.inner_text()
        tab.fill("#filter", "天空")
        assert tab.inner_text("#count") == "1 of 2000 rows" and not faults
        browser.close()


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
