"""tools/generate.py: what it prints, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.runs import load_student
from tests.pretrain.job import Job
from tools.convert_checkpoint import main as convert
from tools.generate import build_parser, main, settings_of


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export") / "folder"
    assert convert(["export", "--megatron-path", str(finished), "--hf-path", str(folder)]) == 0
    return folder


def test_a_seed_gives_the_text_of_the_api_from_a_prompt_and_from_a_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt").write_bytes(b"the old")
    command = ["--load", str(finished), "--max-new-bytes", "20", "--temperature", "0.5"]
    seen = set()
    with world():
        student = load_student(finished).student
        for seed in range(7, 12):
            settings = GenerationSettings(max_new_bytes=20, sampling=Sampling(temperature=0.5), seed=seed)
            # an untrained model's bytes are often no UTF-8, or none at all: they are counted, whatever is shown
            wanted = generate(student, ["the old"], settings)[0].byte_ids
            for prompt in (["--prompt", "the old"], ["--prompt-file", str(tmp_path / "prompt")]):
                assert main([*command, *prompt, "--seed", str(seed)]) == 0
                output = capsys.readouterr()
                assert output.out == "the old" + wanted.decode("utf-8", errors="replace") + "\n"
                assert f"{len(wanted)} bytes in " in output.err and "bytes/s" in output.err
            seen.add(wanted)
    assert len(seen) > 1


def test_boundaries_are_shown(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(finished), "--prompt", "the", "--max-new-bytes", "30", "--show-boundaries"]
    with world():
        assert main(command) == 0
        streamed = capsys.readouterr()
        assert main([*command, "--no-stream"]) == 0
        assert capsys.readouterr().out == streamed.out
        assert main([*command, "--generation", "bytes"]) == 0
    output = capsys.readouterr()
    for shown in (streamed, output):
        assert "|" in shown.out and shown.out.replace("|", "").replace("¦", "").startswith("the")
        assert "bytes per chunk" in shown.err


def test_a_threshold_says_how_long_chunks_become(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marks = []
    for threshold, more in (("0.001", []), ("0.999", []), ("0.999", ["--speculate", "4"])):
        command = ["--load", str(exported), "--prompt", "the", "--max-new-bytes", "30", "--show-boundaries", *more]
        assert main([*command, "--boundary-threshold", threshold]) == 0
        marks.append(capsys.readouterr().out.count("|"))
    assert marks[0] > 25 and marks[1] < 5 and marks[2] == marks[1]


def test_prompts_are_labelled_and_their_texts_do_not_depend_on_who_runs_beside_them(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "12", "--seed", "3", "--utf8", "constrain"]
    for prompt in ("the", "", "né", "old house"):
        command += ["--prompt", prompt]
    outputs = []
    for more in ([], ["--batch-size", "3"], ["--stream"]):
        assert main([*command, *more]) == 0
        output = capsys.readouterr()
        outputs.append(output.out)
        assert "valid UTF-8" in output.err or "no UTF-8" in output.err
    assert outputs[0] == outputs[1] == outputs[2]
    parts = outputs[0].split("--- prompt ")
    assert [part[:6] for part in parts[1:]] == [f"{number} of 4" for number in range(1, 5)]
    assert parts[3].startswith("3 of 4 ---\nné") and parts[4].startswith("4 of 4 ---\nold house")


def test_an_export_writes_what_its_run_does(finished: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for folder in (finished, finished / "2b", exported):
        with world():
            assert main(["--load", str(folder), "--prompt", "the", "--max-new-bytes", "24", "--temperature", "0"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize(
    ("stored", "flags", "wanted"),
    [
        (0.7, [], 0.7),
        (0.7, ["--boundary-threshold", "0.2"], 0.2),
        (0.7, ["--boundary-threshold", "none"], None),
        (0.7, ["--generation", "bytes"], None),
        (None, [], None),
    ],
)
def test_an_exports_threshold_holds_unless_another_or_none_is_given(
    tmp_path: Path, stored: float | None, flags: list[str], wanted: float | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "megabyte", "boundary_threshold": stored}))
    arguments = build_parser().parse_args(["--load", str(tmp_path), "--prompt", "a", *flags])
    assert settings_of(arguments).sampling.boundary_threshold == wanted


def test_a_stop_text_and_a_seed_reach_the_engine(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--max-new-bytes", "40", "--utf8", "constrain"]
    for seed in range(20):  # until one has something to stop at
        assert main([*command, "--seed", str(seed)]) == 0
        whole = capsys.readouterr().out.removesuffix("\n")
        if len(whole) > 8:
            break
    stop = whole[6:8]
    assert main([*command, "--seed", str(seed), "--stop", "no such text", "--stop", stop]) == 0
    output = capsys.readouterr()
    assert output.out == "the" + whole[3:].split(stop)[0] + "\n"
    assert "1 ended by --stop" in output.err


def test_prompts_are_read_from_the_terminal_until_it_ends(
    exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "6", "--temperature", "0"]
    assert main([*command, "--prompt", "the"]) == 0
    wanted = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n/help\nb\udcffd\nthe\n"))
    assert main([*command, "--interactive"]) == 0
    output = capsys.readouterr()
    assert output.out == wanted * 2
    assert output.err.count("Ctrl-D ends") == 2
    assert "error: the prompt has byte 255 (0xFF) at offset 1" in output.err
    assert output.err.count("bytes/s") == 2


def test_mistakes_are_one_error_line(
    finished: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(b"abc\xfe")
    run = ["--load", str(finished)]
    with world():
        for command, message in (
            ([*run, "--prompt-file", str(tmp_path / "bad")], "byte 254 (0xFE) at offset 3"),
            ([*run, "--prompt-file", str(tmp_path / "missing")], "missing"),
            ([*run, "--prompt", "ab\udcff"], "byte 255 (0xFF) at offset 2"),
            ([*run, "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
            ([*run, "--prompt", "a", "--boundary-threshold", "1"], "boundary_threshold is 1.0"),
            (
                [*run, "--prompt", "a", "--boundary-threshold", "0.5", "--generation", "bytes"],
                "a boundary threshold decides bits",
            ),
            ([*run, "--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
            ([*run, "--prompt", "a", "--top-k", "-2"], "top_k is -2"),
            ([*run, "--prompt", "a", "--min-p", "2"], "min_p is 2.0"),
            ([*run, "--prompt", "a", "--stop", ""], "none of them empty"),
            ([*run, "--prompt", "a", "--batch-size", "0"], "--batch-size is 0"),
            ([*run, "--prompt", "a", "--generation", "bytes", "--scoring", "official"], "joint generation only"),
            ([*run, "--prompt", "fine", "--prompt", "b\udcfe"], "prompt 1 has byte 254"),
            ([*run, "--prompt", "a", "--paths", "0"], "paths is 0"),
            ([*run, "--prompt", "a", "--max-new-bytes", "-1"], "max_new_bytes is -1"),
            ([*run, "--prompt", "a", "--stage", "1c"], "the decoder is untrained"),
            (["--load", str(tmp_path), "--prompt", "a"], "is not a run and not an exported student"),
            (["--load", str(job.teacher), "--prompt", "a"], "is a converted teacher"),
        ):
            assert main(command) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and message in error and "\n" not in error


def test_a_run_that_has_not_reached_2a_cannot_generate(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.run(tmp_path / "run", "--stages", "1a") == 0
    capsys.readouterr()
    assert main(["--load", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "after stage 1a the decoder is untrained and cannot generate" in capsys.readouterr().err


def test_a_folder_that_is_no_student_or_a_damaged_one_is_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    fields = json.loads((exported / "config.json").read_text())
    backbone = fields["backbone"]
    for changed, message in (
        ({**fields, "model_type": "llama"}, "of type 'llama', not an exported student"),
        ({**fields, "backbone": {**backbone, "num_layers": 3}}, "the weights do not fit config.json"),
        ({**fields, "backbone": {**backbone, "wings": 2}}, "unknown field wings"),
        ({**fields, "backbone": {**backbone, "max_position_embeddings": 5}}, "the backbone has 5 positions"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert main(["--load", str(tmp_path), "--prompt", "a prompt of some length" * 4]) == 2
        assert message in capsys.readouterr().err
    assert main(["--load", str(exported), "--stage", "2a", "--prompt", "a"]) == 2
    assert "is an export, which holds the weights of one stage" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--speculate", "4"], ["--speculate", "auto"], ["--kernels", "reference"]])
def test_drafts_and_kernels_change_no_text(exported: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--prompt", "a hill", "--max-new-bytes", "30"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, *more, "--batch-size", "1"]) == 0
    assert capsys.readouterr().out == plain
    assert main([*command, *more, "--stream"]) == 0
    assert capsys.readouterr().out == plain


def test_what_the_engine_does_not_do_is_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--speculate", "4", "--generation", "bytes"]
    assert main(command) == 2
    assert "--speculate and --kernels fused are for" in capsys.readouterr().err
