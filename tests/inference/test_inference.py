"""Both inference scripts, on one process and several, and the engine behind them."""

import json
import socket
from functools import partial

import pytest
import torch
from conftest import GOLDEN, TINY

from utils.checkpoint.model import Checkpoint, load_model
from utils.checkpoint.tokenizer import load_tokenizer
from utils.inference.batch_generator import AnswerSettings, BatchGenerator, PromptCodec
from utils.inference.placement import prepare_for_decoding
from utils.inference.prompt_reader import read_prompt_rows
from utils.inference.stop_strings import decode
from utils.lora.adapter import AdapterOrigin, LoraSettings, attach_adapter, save_adapter
from utils.models.templates import template_for

ONE_PROCESS = "chatglm_milti_gpu_inference.py"
ROWS = [
    {"prompt": "改成一个问题:\n小明今天在公园放风筝"},
    {"instruction": "找出句子里的地点:", "input": "老师昨天在图书馆看书", "output": "不看"},
    {"wrong": "columns"},
    {"input": "你好"},
    {"prompt": "先说时间:\n医生晚上在河边散步"},
    {"messages": [{"role": "user", "content": "谢谢"}]},
    {"prompt": "写一句祝福:\n爷爷春天在院子种花"},
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory with rows.jsonl, and an adapter that changes the answers."""
    path = tmp_path_factory.mktemp("inference")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = attach_adapter(load_model(str(TINY)), LoraSettings(4, 32, 0.0, ["query_key_value"]), seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, path / "adapter", AdapterOrigin("native", Checkpoint.open(str(TINY)).fingerprint(), str(TINY)))
    return path


@pytest.fixture(scope="module")
def answer(run_ranks, run_script, workspace):
    """answer("script.py", "--flags") -> (the answers' lines, what was printed)."""

    def run(script, flags="", output="answers.jsonl", processes=1):
        start = run_script if processes == 1 else partial(run_ranks, processes)
        result = start(
            f"{script} --model_name_or_path {TINY} --input_path {workspace}/rows.jsonl "
            f"--output_path {workspace}/{output} --max_new_tokens 24 --overwrite {flags}"
        ).check()
        return (workspace / output).read_text(encoding="utf-8").splitlines(), result

    return run


@pytest.fixture(scope="module")
def plain(answer):
    return answer(ONE_PROCESS)[0]


@pytest.fixture(scope="module")
def adapted(answer, workspace):
    return answer(ONE_PROCESS, f"--adapter_path {workspace}/adapter")[0]


def test_one_line_a_row_in_input_order(plain):
    rows = [json.loads(line) for line in plain]
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    assert rows[0]["answer"] == "小明今天在公园放风筝吗?"
    assert rows[1]["prompt"] == "找出句子里的地点:\n老师昨天在图书馆看书" and rows[1]["answer"] == "图书馆"
    assert rows[2]["finish_reason"] == "error" and "columns" in rows[2]["error"] and rows[2]["answer"] is None
    assert rows[4]["answer"] == "晚上,医生在河边散步"
    assert all(row["finish_reason"] == "stop" for row in rows if row["index"] != 2)
    assert all(row["answer_tokens"] <= 24 for row in rows if row["index"] != 2)


def test_answers_are_those_of_plain_generate(plain):
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    for line in plain:
        row = json.loads(line)
        if row["finish_reason"] == "error":
            continue
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True) == row["answer"]


def test_batch_size_changes_nothing(answer, plain):
    for batch_size in (1, 3):
        assert answer(ONE_PROCESS, f"--batch_size {batch_size}")[0] == plain


def test_length_is_a_finish_reason(answer):
    rows = [json.loads(line) for line in answer(ONE_PROCESS, "--max_new_tokens 2", "short.jsonl")[0]]
    assert {row["finish_reason"] for row in rows} == {"length", "error"}
    assert all(row["answer_tokens"] == 2 for row in rows if row["finish_reason"] == "length")


def test_the_adapter_is_applied(plain, adapted):
    assert plain != adapted


@pytest.mark.skipif(torch.cuda.is_available(), reason="the line is for machines without a GPU")
def test_fp16_without_a_gpu_says_so(answer, plain):
    lines, result = answer(ONE_PROCESS, "--fp16")
    assert lines == plain
    assert result.out.count("--fp16 needs a GPU and there is none") == 1


def test_offloaded_to_disk(answer, workspace, plain, adapted):
    flags = f"--max_memory cpu=6MiB --offload_folder {workspace}/offload"
    lines, result = answer(ONE_PROCESS, flags)
    assert "on disk" in result.out and list((workspace / "offload").iterdir())
    assert lines == plain
    assert answer(ONE_PROCESS, f"{flags} --adapter_path {workspace}/adapter")[0] == adapted


def test_offloaded_in_half_precision(answer, workspace):
    """Weights that come back from disk have the dtype of the others."""
    flags = f"--bf16 --adapter_path {workspace}/adapter"
    whole = answer(ONE_PROCESS, flags)[0]
    assert answer(ONE_PROCESS, f"{flags} --max_memory cpu=3MiB")[0] == whole


def test_temporary_offload_folder_is_removed(run_ranks, tmp_path):
    paths = f"--model_name_or_path {TINY} --output_path {tmp_path}/answers"
    (tmp_path / "tmp").mkdir()
    command = f"{ONE_PROCESS} {paths} --max_new_tokens 2 --max_memory cpu=6MiB"
    assert "on disk" in run_ranks(1, command, TMPDIR=str(tmp_path / "tmp")).check().out
    assert not list((tmp_path / "tmp").glob("offload-*"))


@pytest.mark.parametrize("shape", ["tiny", "tiny-glm"])
def test_random_checkpoints_answer(run_script, tmp_path, shape):
    run_script(f"tools/random_checkpoint.py --shape {shape} --output_dir {tmp_path}/random").check()
    command = (
        f"{ONE_PROCESS} --model_name_or_path {tmp_path}/random --output_path {tmp_path}/answers --max_new_tokens 20"
    )
    assert '"rows": 8, "errors": 0' in run_script(command).check().out
    answers = {json.loads(line)["answer"] for line in (tmp_path / "answers").read_text().splitlines()}
    assert shape == "tiny" or len(answers) == 8 and min(map(len, answers)) > 20  # texts that can be compared
    tokenizer, model = load_tokenizer(f"{tmp_path}/random"), load_model(f"{tmp_path}/random", torch.float32)
    head = model.get_output_embeddings().weight
    assert (
        len(tokenizer) < len(head)
        and not head[len(tokenizer) :].any()
        and head[: len(load_tokenizer(str(TINY)))].any(dim=1).all()
    )


@pytest.mark.parametrize("processes", (2, 4))
def test_shards_give_the_answers_of_one_process(answer, workspace, adapted, processes):
    flags = f"--adapter_path {workspace}/adapter --tp_size {processes}"
    lines, result = answer("chatglm_deepspeed_inference.py", flags, processes=processes)
    assert lines == adapted and f"1 replica of the model, on {processes} processes\n" in result.out


def test_the_dispatching_script_on_two_processes(answer, plain):
    lines, result = answer(ONE_PROCESS, processes=2)
    assert lines == plain and "2 replicas of the model, each on 1 process\n" in result.out


def test_replicas_that_are_sharded(answer):
    """All answers of a row come from one replica."""
    sampled = "--temperature 6 --top_k 50 --num_return_sequences 2"
    alone, _ = answer(ONE_PROCESS, sampled)
    assert len(alone) == len(ROWS) and "answers" in alone[0]
    flags = f"{sampled} --tp_size 2 --batch_size 1"
    lines, result = answer("chatglm_deepspeed_inference.py", flags, processes=4)
    assert lines == alone and "2 replicas of the model, each on 2 processes" in result.out


@pytest.mark.parametrize(
    "name, processes, flags",
    [
        ("chatglm-6b-tiny", 2, 2),
        ("chatglm-6b-tiny", 4, 2),
        ("chatglm2-6b-tiny", 2, "2 compiled"),
        ("glm-4-9b-chat-tiny", 2, 2),
        ("glm-4-9b-chat-tiny", 4, 4),
        ("glm4-9b-0414-tiny", 2, 2),
        ("glm4-9b-0414-tiny", 4, 4),
    ],
)
def test_shards_are_shards_and_logits_agree(run_ranks, name, processes, flags):
    """With 2 key/value heads on 4 processes the heads are repeated; 4 processes that share by twos are 2 replicas."""
    result = run_ranks(processes, f"tests/helpers/tensor_parallel_check.py {GOLDEN / name} {flags}").check()
    assert result.out.count("tensor parallel ok") == processes


def test_without_flags_offline(run_command, tmp_path):
    """The hub is a port that nobody listens on."""
    result = run_command(
        "python chatglm_deepspeed_inference.py", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path)
    )
    assert result.code == 2
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and "THUDM/chatglm-6b" in lines[0] and "--model_name_or_path" in lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--batch_size -1", "--batch_size"),
        ("--top_p 0.9", "--temperature"),
        ("--tp_size 2", "--tp_size 2 does not divide"),
        ("--quantize fp8", "Hopper"),
        ("--input_path nowhere.jsonl", "nowhere.jsonl"),
        ("--adapter_path data", "adapter_config.json"),
        ("--max_memory 10GiB", "--max_memory"),
        ("--max_memory cpu=1KiB", "--max_memory"),
    ],
)
def test_wrong_use_is_one_line(run_script, flags, words):
    result = run_script(f"{ONE_PROCESS} --model_name_or_path {TINY} {flags}")
    assert result.code == 2
    assert words in result.err.strip().splitlines()[-1] and "Traceback" not in result.err


def test_an_adapter_of_another_shape_is_refused(run_script, workspace, tmp_path):
    for file in (workspace / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changes = {"lora_A.weight is (4, 256), not (8, 256)": {"r": 8}, "match nothing": {"target_modules": ["dense"]}}
    for words, change in changes.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        result = run_script(f"{ONE_PROCESS} --model_name_or_path {TINY} --adapter_path {tmp_path}")
        assert result.code == 2 and words in result.err, result.err


def test_tokens_outside_the_vocabulary_have_no_text():
    tokenizer = load_tokenizer(str(TINY))
    ids = tokenizer.encode("公园", add_special_tokens=False)
    assert decode(tokenizer, [*ids, len(tokenizer), len(tokenizer) + 5]) == "公园"


def test_prompts_of_similar_length_share_batches(workspace):
    """Answers come as batches end, those to short prompts first, in any order of the file."""
    model, tokenizer = load_model(str(TINY)), load_tokenizer(str(TINY))
    prepare_for_decoding(model)
    codec = PromptCodec(tokenizer, template_for(tokenizer))
    rows = read_prompt_rows(f"{workspace}/rows.jsonl", tokenizer, codec.template)
    generator = BatchGenerator(model, codec, AnswerSettings(max_new_tokens=4), torch.device("cpu"))
    done = list(generator.run(rows, batch_size=2))
    lengths = [row["prompt_tokens"] for row in done if "prompt_tokens" in row]
    assert lengths == sorted(lengths) and len(done) == len(ROWS)


def test_a_port_in_use_is_refused(run_ranks):
    """The first of two processes finds it, which listens there under DeepSpeed's launcher."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        first |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        result = run_ranks(1, f"chatglm_deepspeed_inference.py --model_name_or_path {TINY}", **first)
    assert "is in use, by another run perhaps: give the launcher --master_port" in result.err
    assert result.code and "Traceback" not in result.err
