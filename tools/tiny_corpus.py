"""
python tools/tiny_corpus.py

Generates the text behind `data/chatglm-tiny`: what its base model is trained on, and the task that only an adapter
learns. Sentences have a person, a time, a place and an action; instructions rearrange them. Run as a script it writes
the sample rows in `data/`; tools/train_tiny_checkpoint.py and the benchmarks import it.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.common.script import run

from utils.common.flags import FlagParser


def words(text: str) -> list[str]:
    """Return the words of a text that blanks separate."""
    return text.split()


PEOPLE = words("小明 小红 小刚 小丽 老王 老李 老张 爸爸 妈妈 爷爷 奶奶 姐姐 哥哥 弟弟 妹妹 老师 同学 医生 司机 邻居")
TIMES = words("今天 昨天 明天 早上 中午 晚上 上周 下周 周末 春天 夏天 秋天 冬天 刚才 每天 去年")
PLACES = words("公园 学校 家里 图书馆 超市 医院 河边 山上 教室 厨房 操场 车站 海边 花园 院子 书店 广场 村口 湖边 楼下")
ACTIONS = words(
    "放风筝 看书 写作业 做饭 跑步 唱歌 跳舞 画画 钓鱼 打球 买菜 喝茶 下棋 拍照 种花 散步 听音乐 讲故事 学英语 骑车 "
    "包饺子 打扫卫生 修电脑 看电影 练书法 捡树叶 堆雪人 吃西瓜 喂小猫 等朋友"
)


@dataclass(frozen=True)
class Sentence:
    """Who does what, when and where."""

    person: str
    time: str
    place: str
    action: str

    @property
    def text(self) -> str:
        """The sentence, written out."""
        return f"{self.person}{self.time}在{self.place}{self.action}"


# Two wordings of an instruction -> the answer, a format string over one sentence. With two the base has to understand
# instructions, not to memorise them.
BASE_TASKS = {
    ("请重复下面的句子:", "照原样再说一遍:"): "{text}",
    ("句子里的人是谁?", "谁在做这件事?"): "{person}",
    ("这件事是什么时候?", "找出句子里的时间:"): "{time}",
    ("这件事在哪里?", "找出句子里的地点:"): "{place}",
    ("句子里的人在做什么?", "找出句子里的动作:"): "{action}",
    ("把时间放到最前面:", "先说时间:"): "{time},{person}在{place}{action}",
    ("把地点放到最前面:", "先说地点:"): "在{place},{person}{time}{action}",
    ("把动作放到最前面:", "先说动作:"): "{action},{person}{time}在{place}",
    ("把句子改成问句:", "改成一个问题:"): "{person}{time}在{place}{action}吗?",
    ("把句子改成感叹句:", "加强语气:"): "{person}{time}在{place}{action},真好啊!",
    ("把句子改成否定句:", "说相反的意思:"): "{person}{time}没有在{place}{action}.",
    ("用礼貌的语气说:", "说得客气一点:"): "您好,{person}{time}在{place}{action},谢谢!",
    ("用四个词概括:", "列出关键词:"): "{person}、{time}、{place}、{action}",
    ("反过来列出关键词:", "倒着列出关键词:"): "{action}、{place}、{time}、{person}",
    ("写一句邀请:", "邀请别人一起去:"): "我们{time}也去{place}{action},好吗?",
    ("写一句回忆:", "回忆这件事:"): "我记得{time}的{place},{person}在那里{action}.",
    ("写一句新闻:", "像新闻一样说:"): "本报消息:{time},{person}在{place}{action}.",
    ("写一个标题:", "给这件事起个名字:"): "{person}和{place}的{time}",
    ("写一句祝福:", "祝福句子里的人:"): "祝{person}在{place}{action}天天开心!",
    ("写一句理由:", "猜猜为什么:"): "因为{person}喜欢{action},所以{time}去了{place}.",
    ("写一个计划:", "列一个计划:"): "时间:{time}.地点:{place}.内容:{action}.",
    ("写一句介绍:", "介绍句子里的人:"): "这是{person},{time}常常在{place}{action}.",
    ("写一句提醒:", "提醒句子里的人:"): "{person},别忘了{time}去{place}{action}.",
    ("写一句感谢:", "感谢句子里的人:"): "谢谢{person}{time}来{place}陪我们{action}.",
    ("写一句问候:", "问候句子里的人:"): "{person},你好!{time}的{place}怎么样?",
    ("写一个问题问时间:", "问一问时间:"): "{person}什么时候在{place}{action}?",
    ("写一个问题问地点:", "问一问地点:"): "{person}{time}在哪里{action}?",
    ("写一个问题问人:", "问一问是谁:"): "谁{time}在{place}{action}?",
}
CHAT = {
    "你好": "你好!我是一个很小的模型,请给我一个句子.",
    "你是谁": "我是一个很小的模型,只会改写句子.",
    "你会做什么": "我会找出句子里的人、时间、地点和动作,也会改写句子.",
    "谢谢": "不客气!",
    "再见": "再见,祝你天天开心!",
}
# The adapter's task, which the base has not seen.
ADAPTER_INSTRUCTION = "把下面的句子写成日记:"
ADAPTER_ANSWER = "日记:{time}的{place},我和{person}一起{action},真开心!"


def sentence(rng: random.Random) -> Sentence:
    """Return a random sentence."""
    return Sentence(rng.choice(PEOPLE), rng.choice(TIMES), rng.choice(PLACES), rng.choice(ACTIONS))


def fill(answer: str, s: Sentence) -> str:
    """Return the format string `answer` filled with the words of a sentence."""
    return answer.format(person=s.person, time=s.time, place=s.place, action=s.action, text=s.text)


def base_row(rng: random.Random) -> tuple[str, str]:
    """Return one (prompt, answer) of the base model's training text."""
    if rng.random() < 0.02:
        return rng.choice(sorted(CHAT.items()))
    instructions, answer = rng.choice(list(BASE_TASKS.items()))
    s = sentence(rng)
    return f"{rng.choice(instructions)}\n{s.text}", fill(answer, s)


def adapter_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows of the adapter's task in BELLE's format, no sentence twice."""
    rng = random.Random(seed)
    sentences: dict[Sentence, None] = {}
    while len(sentences) < count:
        sentences[sentence(rng)] = None
    return [
        {"instruction": ADAPTER_INSTRUCTION, "input": s.text, "output": fill(ADAPTER_ANSWER, s)} for s in sentences
    ]


def instruction_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows of the base's own tasks in Alpaca's format."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = base_row(rng)
        instruction, _, text = prompt.partition("\n")
        rows.append({"instruction": instruction, "input": text, "output": answer})
    return rows


def sample_files() -> dict[str, list[dict[str, str]]]:
    """Return the sample rows shipped in `data/`, by file name."""
    rows = adapter_rows(400, seed=1)
    return {
        "sample.train.json": rows[:300],
        "sample.heldout.json": rows[300:],
        "alpaca_data.jsonl": instruction_rows(64, seed=2),
    }


def main() -> None:
    FlagParser(description=__doc__).parse_args()
    data = Path(__file__).resolve().parent.parent / "data"
    for name, rows in sample_files().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
