"""The score of text files, and of lm-evaluation-harness's tasks, against one forward pass a token, in float64."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import world
from harness_tasks import write_task
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from megahp import checkpoint, cli
from megahp.config import resolve
from megahp.convert.tokenizers import bytes_tokenizer
from megahp.evaluate import perplexity
from megahp.evaluate.sample import TrainedModel, ensemble, generate, load_trained, single_rank_model
from megahp.parallel.parameters import model_state, storage
from megahp.train.run import state_of_weights

CONTEXT, EOD = 24, 256
MODELS: dict[str, dict[str, Any]] = {
    "rope": {"kv_heads": 2},
    "experts": {"positions": "alibi", "tied_embeddings": True, "experts": 4, "expert_width": 16, "mlp_width": 0},
}
# shorter than the context, as long, one longer, and longer by no multiple of the stride; more than one byte a letter
TEXTS = ["x", "a" * 3 + "b" * 21, "0123456789" * 2 + "gzuäö", "what is scored once is scored once; " * 3 + "end"]


@torch.no_grad()
def write_run(folder: Path, model: dict[str, Any], tokenizer: str = "bytes", **data: Any) -> None:
    """A run directory whose newest checkpoint holds random weights, of more ids than the tokenizer has."""
    tree = {
        "model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48, "vocab_size": 300, **model},
        "data": {"sequence_length": CONTEXT, "tokenizer": tokenizer, **data},
        "parameterization": {"name": "sp"},
        "train": {"dtype": "float64"},
    }
    config = resolve.resolve([("test", tree)]).config
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: storage(weight) + 0.2 * torch.randn(storage(weight).shape, generator=generator)
        for name, weight in model_state(single_rank_model(config)).items()
    }
    for step in (1, 2):  # the newest counts
        scaled = ((name, value * step) for name, value in weights.items())
        checkpoint.write(checkpoint.path(folder / "checkpoints", step), scaled, state_of_weights(config), 10**9)


@torch.no_grad()
def after(trained: TrainedModel, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the token that follows these, [vocabulary]; of several models, of their mean."""
    members = (trained, *trained.others)
    return torch.stack([each.model(torch.tensor([ids]))[0, -1, :300].softmax(0) for each in members]).mean(0).log()


def one_by_one(trained: TrainedModel, ids: Sequence[int], first: int, context: int, stride: int) -> tuple[float, bool]:
    """Sum of -log p of ids[first:], a forward pass each, and whether each is the likeliest. From token `context` on, a
    window begins every `stride` tokens, and the last where it is full."""
    total, likeliest, ends = 0.0, True, max(context + 1, first + stride)
    for number in range(first, len(ids)):
        while number >= ends:
            ends += stride
        begin = max(0, min(ends, len(ids)) - context - 1)
        found = after(trained, ids[begin:number])
        total -= found[ids[number]].item()
        likeliest &= found.argmax().item() == ids[number]
    return total, likeliest


def said(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


def scored(folder: Path) -> dict[str, Any]:
    """What one process finds for all tests."""
    import zstandard

    lines = [json.dumps({"body": text}) for text in TEXTS[:3]] + ['{"body": 3}', "", "no JSON"]
    (folder / "some.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines).encode()))
    (folder / "long.txt").write_text(TEXTS[3])
    (folder / "empty.txt").write_text("")
    (folder / "object.json").write_text(json.dumps({"layers": 3}, indent=1))
    found: dict[str, Any] = {}
    for name, model in MODELS.items():
        write_run(folder / name, model)
        trained = load_trained(folder / name)
        reference = {
            (context, stride): [one_by_one(trained, [EOD, *text.encode()], 1, context, stride)[0] for text in TEXTS]
            for context, stride in ((CONTEXT, CONTEXT), (CONTEXT, 12), (CONTEXT, 1), (10, 7))
        }
        for (context, stride), nats in reference.items():
            scores = perplexity.evaluate(trained, [TEXTS[:2], TEXTS[2:]], context, stride)
            found[name, context, stride] = scores, [sum(nats[:2]), sum(nats[2:])]
        own = [*b"Go on"]
        for _ in range(30):
            own.append(int(after(trained, own[-CONTEXT:]).argmax()))
        pairs = [(own[:25], 5), ([*b"Go on and on"], 5), (own, 34), ([*own[:9], *b"now", *own[9:20]], 15)]
        pieces = [next(perplexity.windows(torch.tensor(ids), first, CONTEXT, CONTEXT)) for ids, first in pairs]
        likelihoods = {number: found for number, *found in perplexity.scores(trained, pieces)}
        found[name, "continuations"] = [
            (*likelihoods[n], *one_by_one(trained, *pair, CONTEXT, CONTEXT)) for n, pair in enumerate(pairs)
        ]
        found[name, "command"] = sum(reference[CONTEXT, 12][:3]), reference[CONTEXT, 12][3]
        files = [folder / "some.jsonl.zst", folder / "long.txt", "--json-key", "body", "--most-bad", "0.4"]
        found[name, "json"] = said("evaluate", folder / name, *files, "--json")
        found[name, "table"] = said("evaluate", folder / name / "checkpoints" / "step-00000002", *files)
    found["ensemble"] = of_several(folder)
    found["beginnings"] = beginnings(folder)
    lines = iter(
        Path(contextlib.__file__).read_text().split("\n")
    )  # it drops spaces before and after, as it does unasked
    trainer = {"vocab_size": 290, "model_type": "bpe", "minloglevel": 3, "model_prefix": str(folder / "stripping")}
    SentencePieceTrainer.train(sentence_iterator=lines, **trainer)
    write_run(folder / "stripping", {}, str(folder / "stripping.model"))
    write_run(folder / "larger", {"vocab_size": 301})
    write_run(folder / "masked", {}, mask_documents=True)
    (folder / "spaces.txt").write_text("   \n \n")
    run = folder / "rope"
    found["widest batch"] = widest_batch(load_trained(run))
    found["samples"] = said("sample", run, "--prompt", "Go", "--tokens", "3", "--samples", "2")
    found["mistakes"] = {
        "stride": said("evaluate", run, folder / "long.txt", "--stride", "25"),
        "context": said("evaluate", run, folder / "long.txt", "--context", "25"),
        "empty": said("evaluate", run, folder / "empty.txt"),
        "spaces": said("evaluate", folder / "stripping", folder / "spaces.txt"),
        "missing": said("evaluate", run, folder / "none.txt"),
        "no file": said("evaluate", run, folder / "experts"),
        "vocabularies": said("evaluate", run, folder / "larger", folder / "long.txt"),
        "tokenizers": said("evaluate", run, folder / "stripping", folder / "long.txt"),
        "starts": said("evaluate", run, folder / "masked", folder / "long.txt"),
        "key": said("evaluate", run, folder / "long.txt", "--json-key", "body"),
        "run": said("evaluate", folder, folder / "long.txt"),
        "bad": said("evaluate", run, folder / "some.jsonl.zst", "--json-key", "body"),
        "binary": said("evaluate", run, run / "checkpoints" / "step-00000002" / "shard-00000.safetensors"),
        "JSON": said("evaluate", run, folder / "object.json"),
    }
    return found


def of_several(folder: Path) -> dict[str, Any]:
    """Three models, one of a shorter context: scores of the texts and what they must be; what the command prints."""
    write_run(folder / "short", {}, sequence_length=10)
    names = [folder / name for name in ("rope", "experts", "short")]
    trained = ensemble([load_trained(name) for name in names])
    nats = [one_by_one(trained, [EOD, *text.encode()], 1, 10, 5) for text in TEXTS]
    (score,) = perplexity.evaluate(trained, [TEXTS], trained.context, 5)
    alone = ensemble([load_trained(names[0])])
    printed = said("evaluate", *names, folder / "long.txt", "--json")
    return {
        "score": (score.nats, sum(each for each, _ in nats)),
        "context": trained.context,
        "alone": alone.others,
        "printed": (printed, nats[3][0]),
        "table": said("evaluate", *names, folder / "long.txt"),
    }


# What stood before a document's first token in training: settings, and what is before the first token scored, and what
# of it the others see. A model that nothing is known of is scored as before; an imported one, as by lm-eval.
BEGINNINGS: dict[str, tuple[dict[str, Any], list[int] | None, list[int]]] = {
    "an end token": ({"begin": "eos", "bos": "257"}, [EOD], [EOD]),
    "masked": ({"begin": "eos", "bos": "257", "mask_documents": True}, [EOD], []),
    "a begin token": ({"begin": "bos", "bos": "257"}, [257], [257]),
    "a begin token, masked": ({"begin": "bos", "bos": "257", "mask_documents": True}, [257], [257]),
    "no token": ({"begin": "none", "bos": "257"}, None, []),
    "before it was recorded": ({}, [EOD], [EOD]),
    "before it was recorded, masked": ({"mask_documents": True}, [EOD], []),
    "imported": ({"bos": "257"}, [257], [257]),
}


def beginnings(folder: Path) -> dict[str, Any]:
    """For each: tokens, bytes and nats of two texts, the nats they must have; and tokens generated without a prompt and
    with one, and those they must be."""
    folder = folder / "beginnings"
    folder.mkdir()
    file, tree = folder / "tokenizer.json", bytes_tokenizer(EOD)
    tree["added_tokens"].append(tree["added_tokens"][0] | {"id": 257, "content": "<s>"})
    file.write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "bos_token": "<s>"}')
    found = {}
    for name, (data, before, seen) in BEGINNINGS.items():
        write_run(folder / name, MODELS["rope"], str(file), **data)
        trained = load_trained(folder / name)
        nats = 0.0
        for text in TEXTS[2:]:
            ids = list(text.encode())
            if before and not seen:
                nats -= after(trained, before)[ids[0]].item()
            nats += one_by_one(trained, [*seen, *ids], 1, CONTEXT, CONTEXT)[0]
        own = {}
        for prompt in ("", "Go"):
            begin = seen if not prompt or data.get("begin") == "bos" else []
            own[prompt] = ids = [*begin, *prompt.encode()]
            for _ in range(4):
                ids.append(int(after(trained, ids or [EOD])[:258].argmax()))
        (score,) = perplexity.evaluate(trained, [TEXTS[2:]], CONTEXT, CONTEXT)
        written = {prompt: generate(folder / name, prompt, 4, 0, 0, 1)[0] for prompt in own}
        expected = {prompt: trained.tokenizer.decode(ids) for prompt, ids in own.items()}
        found[name] = score, nats, written, expected
    return found


def widest_batch(trained: TrainedModel) -> int:
    """Tokens the model is given at once, of a text of more than are good for its memory."""
    seen: list[int] = []
    with trained.model.register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0].numel())):
        perplexity.evaluate(trained, [["a" * 20_000]], CONTEXT, CONTEXT)
    return max(seen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[Any, Any]:
    return world.run(1, scored, folder)[0]


@pytest.mark.parametrize(("context", "stride"), [(CONTEXT, CONTEXT), (CONTEXT, 12), (CONTEXT, 1), (10, 7)])
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_scored_once(found: Any, name: str, context: int, stride: int) -> None:
    scores, nats = found[name, context, stride]
    assert [score.tokens for score in scores] == [score.bytes for score in scores] == [25, 27 + 111]
    assert [score.documents for score in scores] == [2, 2]
    assert [score.nats for score in scores] == pytest.approx(nats, rel=1e-12)


def test_probabilities_of_several_models_are_averaged(found: Any) -> None:
    of_all = found["ensemble"]
    ours, theirs = of_all["score"]
    assert ours == pytest.approx(theirs, rel=1e-12) and of_all["context"] == 10 and of_all["alone"] == ()
    (code, out, _), nats = of_all["printed"]
    printed = json.loads(out)
    assert code == 0 and printed["files"][0]["nats"] == pytest.approx(nats, rel=1e-12)
    assert [Path(name).parts[-3] for name in printed["averaged_with"]] == ["experts", "short"]
    code, out, _ = of_all["table"]
    assert code == 0 and "rope/checkpoints/step-00000002 + " in out.splitlines()[0]


def test_several_samples_are_apart(found: Any) -> None:
    code, out, _ = found["samples"]
    first, second = out.removesuffix("\n").split("\n\n---\n\n")
    assert code == 0 and first != second and first.startswith("Go") and second.startswith("Go")


def test_a_small_vocabulary_does_not_make_a_large_batch(found: Any) -> None:
    assert 2**13 < found["widest batch"] <= 2**14


@pytest.mark.parametrize("name", MODELS)
def test_a_continuation_is_scored_after_its_context(found: Any, name: str) -> None:
    """Its likelihood, and whether a model that takes the likeliest token would have written it."""
    for nats, likeliest, expected, is_likeliest in found[name, "continuations"]:
        assert nats == pytest.approx(expected, rel=1e-12) and likeliest == is_likeliest
    assert [row[3] for row in found[name, "continuations"]] == [True, False, True, False]


@pytest.mark.parametrize("name", MODELS)
def test_the_command_prints_loss_bits_and_perplexity(found: Any, name: str) -> None:
    code, out, err = found[name, "json"]
    assert code == 0 and "left out 1: no JSON, the first" in err and "163/163 tokens 100%  ETA 0 s" in err
    printed = json.loads(out)
    assert printed["checkpoint"].endswith("step-00000002") and (printed["context"], printed["stride"]) == (CONTEXT, 12)
    first, second = found[name, "command"]
    for row, nats, size in zip(printed["files"], (first, second, first + second), (52, 111, 163), strict=True):
        assert row["tokens"] == row["bytes"] == size and row["loss"] == pytest.approx(nats / size, rel=1e-12)
        assert row["perplexity"] == pytest.approx(math.exp(nats / size))
        assert row["bits_per_byte"] == pytest.approx(nats / size / math.log(2))  # a token is a byte here
    code, out, _ = found[name, "table"]
    assert code == 0 and out.splitlines()[-1].split() == [
        "all", "163", "163", f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:.6g}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("stride", "--stride 25 must be 1 to 24"),
        ("context", "--context 25 must be 1 to 24"),
        ("empty", "empty.txt holds no text; name another"),
        ("spaces", "spaces.txt holds no text that makes tokens; name another"),
        ("missing", "none.txt' cannot be read"),
        ("key", "--json-key 'body' is for JSON"),
        ("bad", "2 of 5 documents are bad, above --most-bad 0.01, the first at "),
        ("binary", "shard-00000.safetensors' is binary"),
        ("JSON", "object.json' is JSON, but neither lines nor an array of records"),
        ("no file", "experts is a checkpoint or run directory, and no file to evaluate; name one after it"),
        ("vocabularies", "have different tokenizers or vocabularies; average runs of the same"),
        ("tokenizers", "have different tokenizers or vocabularies; average runs of the same"),
        ("starts", "saw other tokens before a document in training; average runs of the same"),
        ("run", "is neither a checkpoint nor a run directory that has one; name one"),
    ],
)
def test_mistakes_are_one_line(found: Any, what: str, words: str) -> None:
    code, out, err = found["mistakes"][what]
    assert code == 2 and out == "" and words in err and err.count("\n") == 1 and err.startswith("megahp: ")


@pytest.mark.parametrize("name", BEGINNINGS)
def test_f11_only_what_training_had_is_before_a_text(found: Any, name: str) -> None:
    """F11: a document's tokens do not see the end of the one before where they were masked; a begin token is there
    where documents had one; a first token that nothing precedes is not scored."""
    score, nats, written, expected = found["beginnings"][name]
    unscored = 2 * (name == "no token")
    assert (score.tokens, score.bytes) == (138 - unscored, 138 - unscored)
    assert score.nats == pytest.approx(nats, rel=1e-12)
    assert written == expected


QUESTIONS = [
    ("Two and two is", [" four", " five and more", " one two three four five six seven eight"], 0),
    ("", ["nothing", "something"], 1),
    ("The prompt alone is longer than the model looks back: ", ["yes", "no"], 0),
]
PROMPTS = ["Go on", "with a prompt that is not short", "and on"]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "likelihood": """
output_type: loglikelihood
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "generation": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [STOP], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path, run: Path) -> dict[str, float]:
    """The tasks, and what they must measure, by a forward pass a token."""
    trained = load_trained(run)

    def likelihood(before: str, text: str) -> tuple[float, bool]:
        head, tail = list(before.encode()) or [EOD], list(text.encode())
        if before.endswith(" "):  # the harness counts it to the continuation
            head, tail = head[:-1], head[-1:] + tail
        nats, likeliest = one_by_one(trained, head + tail, len(head), CONTEXT, CONTEXT)
        return -nats, likeliest

    def greedy(prompt: str) -> str:
        ids = list(prompt.encode())
        for _ in range(6):
            ids.append(int(after(trained, ids[-CONTEXT:])[:257].argmax()))
        return bytes(ids[len(prompt) :]).decode(errors="replace")

    choices = [[likelihood(question, choice)[0] for choice in few] for question, few, _ in QUESTIONS]
    own = [greedy(prompt) for prompt in PROMPTS]
    stop = own[0][3]
    cut = [text.split(stop)[0] for text in own]
    answers = [*own[:2], "unlike it"]
    continuations = [likelihood(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [{"question": q, "choices": few, "answer": n} for q, few, n in QUESTIONS],
        "likelihood": [{"prompt": q, "answer": a} for q, a in zip(PROMPTS, answers, strict=True)],
        "rolling": [{"text": text} for text in TEXTS],
        "generation": [{"prompt": q, "answer": a} for q, a in zip(PROMPTS, [*cut[:2], "unlike it"], strict=True)],
    }
    for name, text in TASKS.items():
        write_task(folder, name, rows[name], text.replace("STOP", json.dumps(stop)))
    nats = -sum(likelihood("", text)[0] for text in TEXTS)
    return {
        "choice acc": sum(max(few) == few[n] for few, (_, _, n) in zip(choices, QUESTIONS, strict=True)) / 3,
        "likelihood perplexity": math.exp(-sum(nats for nats, _ in continuations) / 3),
        "likelihood acc": sum(hit for _, hit in continuations) / 3,
        "rolling bits_per_byte": nats / math.log(2) / sum(len(text.encode()) for text in TEXTS),
        "generation exact_match": 2 / 3,
    }


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: docs/evaluation.md")
def test_tasks_of_the_harness(found: Any, folder: Path) -> None:
    """As a user runs them, in the real harness."""
    tasks = folder / "tasks"
    tasks.mkdir()
    (expected,) = world.run(1, write_tasks, tasks, folder / "rope")
    tool = [sys.executable, str(Path(__file__).parents[2] / "tools" / "evaluate_tasks.py"), str(folder / "rope")]
    done = subprocess.run([*tool, tasks, "--json", folder / "out.json"], capture_output=True, text=True)
    assert done.returncode == 0 and "bits_per_byte" in done.stdout, done.stdout + done.stderr
    results = json.loads((folder / "out.json").read_text())["results"]
    measured = {key: results[key.split()[0]][f"{key.split()[1]},none"] for key in expected}
    assert measured == pytest.approx(expected, rel=1e-9)
    for words, message in (
        ([tasks, "--tasks", "nothing"], "--tasks nothing is not in"),
        ([folder / "rope"], "holds no tasks; name a folder"),
        ([tasks, "--limit", "0"], "--limit 0 must be at least 1"),
    ):
        done = subprocess.run([*tool, *words], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
