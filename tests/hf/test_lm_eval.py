"""lm-evaluation-harness on an exported student: its log-likelihoods are the package's own."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megabyte_distill.evaluation.continuations import score_continuations
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.scoring import score_paths
from megabyte_distill.runs import load_student
from tests.hf.exported import PATHS, Exported, native_greedy
from tests.pretrain.conftest import finished, job

__all__ = ["finished", "job"]

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-evaluation-harness is not installed; pip install '.[test,eval]' && pytest tests/hf/test_lm_eval.py",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"hf": "lm_eval", "megabyte": "megabyte_distill.harness"}
"""What starts the harness with each model."""
DOCUMENTS = [
    {"question": "The quick brown", "choices": ["fox", "dog is", "né 猫"], "answer": 0},
    {"question": "a", "choices": ["b", "<|bos|>"], "answer": 1},
    {"question": "Once upon a time there was a", "choices": ["hill", "house"], "answer": 1},
]
TEXTS = ["The old house stood on a hill.", "né 猫", "x" * 70]
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["never said"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], body: str) -> None:
    """A task that reads a local file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(head + body)


def evaluate(model: str, arguments: str, scratch: Path, tasks: str) -> dict[str, list[dict[str, Any]]]:
    """The harness's command line; the samples of each task in the order of its documents."""
    variables = {
        **os.environ, "HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    out = scratch / f"out_{model}"
    command = [
        sys.executable, "-m", MODULES[model], "--model", model, "--tasks", tasks, "--include_path", str(scratch),
        "--model_args", arguments, "--device", "cpu", "--batch_size", "2", "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=variables, cwd=scratch, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for task in tasks.split(","):
        [file] = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return samples


def named(model: str, exported: Exported) -> str:
    """``--model_args`` of an exported folder."""
    if model == "hf":
        return f"pretrained={exported.folder},trust_remote_code=True"
    return f"path={exported.folder},paths={PATHS}"


def filter_nats(exported: Exported, text: bytes) -> float:
    """Code length of a text under the causal byte filter, as tools/evaluate.py reports it."""
    if not text:
        return 0.0
    score = score_paths(exported.student, [torch.tensor(list(text))], paths=PATHS)
    return float(score.filter_bits[0]) * math.log(2)


@pytest.mark.parametrize("model", MODULES)
def test_choices_and_generations(model: str, exported: Exported, tmp_path: Path) -> None:
    write_task(tmp_path, "local_choice", DOCUMENTS, CHOICE)
    write_task(tmp_path, "local_generate", DOCUMENTS, GENERATE)
    samples = evaluate(model, named(model, exported), tmp_path, "local_choice,local_generate")
    for document, sample in zip(DOCUMENTS, samples["local_choice"], strict=True):
        context = document["question"].encode()
        for choice, response in zip(document["choices"], sample["resps"], strict=True):
            whole = context + b" " + choice.encode()
            wanted = filter_nats(exported, context) - filter_nats(exported, whole)
            assert float(response[0][0]) == pytest.approx(wanted, abs=1e-4)
    for document, sample in zip(DOCUMENTS, samples["local_generate"], strict=True):
        taken = bytes(native_greedy(exported.student, document["question"].encode(), 6))
        assert sample["resps"][0][0] == taken.decode("utf-8", errors="replace")


@pytest.mark.parametrize("model", MODULES)
def test_rolling_log_likelihoods_of_whole_texts(model: str, exported: Exported, tmp_path: Path) -> None:
    write_task(tmp_path, "local_rolling", [{"text": text} for text in TEXTS], ROLLING)
    # under hf the harness puts BOS in front of a rolling text itself
    more = ",add_bos_token=False" if model == "hf" else ""
    samples = evaluate(model, named(model, exported) + more, tmp_path, "local_rolling")
    for text, found in zip(TEXTS, rolled(samples), strict=True):
        assert found == pytest.approx(-filter_nats(exported, text.encode()), abs=1e-4)


def test_long_texts_are_cut_alike(exported: Exported, tmp_path: Path) -> None:
    write_task(tmp_path, "local_rolling", [{"text": text} for text in TEXTS], ROLLING)
    found = [
        rolled(evaluate(model, f"{named(model, exported)},max_length=20{more}", tmp_path, "local_rolling"))
        for model, more in (("hf", ",add_bos_token=False"), ("megabyte", ""))
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[1][-1] != pytest.approx(-filter_nats(exported, TEXTS[-1].encode()), abs=1e-2)


def test_a_run_needs_no_export(finished: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "local_choice", DOCUMENTS, CHOICE)
    samples = evaluate("megabyte", f"path={finished / '2b'}", tmp_path, "local_choice")
    student = load_student(finished, "2b").student
    for document, sample in zip(DOCUMENTS, samples["local_choice"], strict=True):
        pairs = [(document["question"].encode(), b" " + choice.encode()) for choice in document["choices"]]
        wanted = [-one.nats for one in score_continuations(student, pairs)]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(wanted, abs=1e-4)


def test_a_tasks_sampling_arguments_arrive_and_those_that_are_unknown_are_told(exported: Exported) -> None:
    from megabyte_distill.harness import MegabyteLM

    model = MegabyteLM(path=str(exported.folder), device="cpu")
    wanted = {"do_sample": True, "temperature": 0.3, "top_p": 0.4, "top_k": 5, "min_p": 0.06, "until": ["."]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        settings = model._settings({**wanted, "max_gen_toks": 7}, seed=2)
    assert settings.sampling == Sampling(temperature=0.3, top_p=0.4, top_k=5, min_p=0.06)
    assert (settings.max_new_bytes, settings.stop, settings.seed) == (7, (b".",), 2)
    with pytest.warns(UserWarning, match=r"num_beams=4, repetition_penalty=1\.2 left out"):
        assert model._settings({**wanted, "repetition_penalty": 1.2, "num_beams": 4}, seed=2).sampling.top_k == 5


def rolled(samples: dict[str, list[dict[str, Any]]]) -> list[float]:
    """The log-likelihood of each text."""
    responses = [sample["resps"][0][0] for sample in samples["local_rolling"]]
    return [float(response[0] if isinstance(response, list) else response) for response in responses]
