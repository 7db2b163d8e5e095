"""tools/generate.py: what it prints, and one line and exit code 2 for every mistake."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from megabyte_distill.config.stage import STAGE_ORDER
from megabyte_distill.hf.exported_folder import load_exported
from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, PromptReading, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.teacher_generation import TeacherGeneration
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.run_folder import teacher_path
from megabyte_distill.runs import load_run_teacher, load_student
from tools.convert_checkpoint import main as convert
from tools.generate import build_parser, main, settings_of


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("export") / "folder"
    assert convert(["export", "--megatron-path", str(finished), "--hf-path", str(folder)]) == 0
    return folder


def test_a_seed_gives_the_text_of_the_api_from_a_prompt_and_from_a_file(
    finished: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "prompt").write_bytes(b"the old")
    command = ["--load", str(finished), "--max-new-bytes", "20", "--temperature", "0.5"]
    seen = set()
    with world():
        student = load_student(str(finished)).student
        for seed in range(7, 12):
            settings = GenerationSettings(max_new_bytes=20, sampling=Sampling(temperature=0.5), seed=seed)
            # an untrained model's bytes are often no UTF-8, or none at all: they are counted, whatever is shown
            wanted = generate(student, ["the old"], settings)[0].byte_ids
            for prompt in (["--prompt", "the old"], ["--prompt-file", str(tmp_path / "prompt")]):
                assert main([*command, *prompt, "--seed", str(seed)]) == 0
                output = capsysbinary.readouterr()
                assert output.out == b"the old" + wanted + b"\n"
                assert f"{len(wanted)} bytes in ".encode() in output.err and b"bytes/s" in output.err
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
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "12", "--seed", "3", "--utf8", "constrain"]
    for prompt in ("the", "", "né", "old house"):
        command += ["--prompt", prompt]
    outputs = []
    for more in ([], ["--batch-size", "3"], ["--stream"]):
        assert main([*command, *more]) == 0
        output = capsysbinary.readouterr()
        outputs.append(output.out)
        assert b"new bytes: valid UTF-8" in output.err
    assert outputs[0] == outputs[1] == outputs[2]
    parts = outputs[0].split(b"--- prompt ")
    assert [part[:6] for part in parts[1:]] == [f"{number} of 4".encode() for number in range(1, 5)]
    assert parts[3].startswith("3 of 4 ---\nné".encode()) and parts[4].startswith(b"4 of 4 ---\nold house")


def test_an_export_writes_what_its_run_does(
    finished: Path, exported: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    outputs = []
    for folder in (finished, finished / "2b", exported):
        with world():
            assert main(["--load", str(folder), "--prompt", "the", "--max-new-bytes", "24", "--temperature", "0"]) == 0
        outputs.append(capsysbinary.readouterr().out)
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


def test_every_flag_reaches_its_place(tmp_path: Path) -> None:
    """No two values are alike, so that none can stand in another's place."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "megabyte"}))
    command = ["--load", str(tmp_path), "--prompt", "a"]
    words = "--temperature 0.3 --top-p 0.4 --top-k 5 --min-p 0.6 --boundary-threshold 0.7 --max-new-bytes 8 --paths 9 "
    words += "--path-window 10 --seed 11 --stop x --stop é --utf8 constrain"
    assert settings_of(build_parser().parse_args([*command, *words.split()])) == GenerationSettings(
        max_new_bytes=8,
        sampling=Sampling(temperature=0.3, top_p=0.4, top_k=5, min_p=0.6, boundary_threshold=0.7),
        paths=9,
        path_window=10,
        seed=11,
        stop=(b"x", "é".encode()),
        utf8=Utf8Mode.CONSTRAIN,
    )
    for flags, fields in (
        ([], {}),
        (["--scoring", "official"], {"reading": PromptReading.OFFICIAL}),
        (["--generation", "bytes"], {"mode": GenerationMode.BYTES}),
    ):
        assert settings_of(build_parser().parse_args([*command, *flags])) == GenerationSettings(**fields)


@pytest.mark.parametrize(
    "flags",
    [
        ["--scoring", "official"],
        ["--generation", "bytes"],
        ["--temperature", "3", "--top-p", "0.2"],
        ["--temperature", "3", "--top-k", "2"],
        ["--temperature", "3", "--min-p", "0.5"],
        ["--paths", "1", "--path-window", "1"],
    ],
)
def test_what_is_written_is_what_the_settings_give(
    exported: Path, flags: list[str], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["--load", str(exported), "--prompt", "the old house", "--max-new-bytes", "16", *flags]
    [wanted] = generate(
        load_exported(exported, "cpu"), ["the old house"], settings_of(build_parser().parse_args(command))
    )
    assert main(command) == 0
    assert capsysbinary.readouterr().out == b"the old house" + wanted.byte_ids + b"\n"


def test_a_stop_text_and_a_seed_reach_the_engine(exported: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--max-new-bytes", "40", "--utf8", "constrain"]
    for seed in range(20):  # until one has something to stop at
        assert main([*command, "--seed", str(seed)]) == 0
        whole = capsysbinary.readouterr().out.removesuffix(b"\n")
        if len(whole) > 8:
            break
    stop = whole[6:8].decode("utf-8", "surrogateescape")
    assert main([*command, "--seed", str(seed), "--stop", "no such text", "--stop", stop]) == 0
    output = capsysbinary.readouterr()
    assert output.out == b"the" + whole[3:].split(whole[6:8])[0] + b"\n"
    assert b"1 ended by --stop" in output.err


def test_prompts_are_read_from_the_terminal_until_it_ends(
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--load", str(exported), "--max-new-bytes", "6", "--temperature", "0"]
    assert main([*command, "--prompt", "the"]) == 0
    wanted = capsysbinary.readouterr().out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the\n/help\nb\xffd\nthe"), "ascii"))
    assert main([*command, "--interactive"]) == 0
    output = capsysbinary.readouterr()
    assert output.out == wanted * 2
    assert output.err.count(b"Ctrl-D ends") == 2
    assert b"error: the prompt has byte 255 (0xFF) at offset 1" in output.err
    assert output.err.count(b"bytes/s") == 2


@pytest.mark.parametrize("last", ["1a", "1b", "1c"])
def test_a_run_that_has_not_reached_2a_cannot_generate(
    finished: Path, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = STAGE_ORDER[STAGE_ORDER.index(last) + 1 :]
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns(*later))
    assert main(["--load", str(tmp_path / "run"), "--prompt", "a"]) == 2
    output, run = capsys.readouterr(), tmp_path / "run"
    said = f"error: after stage {last} the decoder is untrained and cannot generate; complete in {run}: 1a"
    assert said in output.err and "; train on first" in output.err and not output.out


def test_a_stage_without_a_decoder_is_refused_with_those_that_have_one(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--load", str(finished / "1b"), "--prompt", "a"]) == 2
    assert f"complete in {finished}: 1a, 1b, 1c, 2a, 2b; take {finished / '2b'}" in capsys.readouterr().err


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
        ({**fields, "backbone": {**backbone, "max_position_embeddings": 5}}, "fill the 5 positions of the backbone"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert main(["--load", str(tmp_path), "--prompt", "a prompt of some length" * 4]) == 2
        assert message in capsys.readouterr().err
    assert main(["--load", str(exported), "--stage", "2a", "--prompt", "a"]) == 2
    assert "--stage: " in (error := capsys.readouterr().err) and "is an export, which holds the weights of" in error


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", "1"],
        ["--stream"],
        ["--scoring", "official", "--batch-size", "1"],
        ["--generation", "bytes", "--batch-size", "1"],
        ["--teacher", "--batch-size", "1"],
        ["--teacher", "--stream"],
    ],
)
def test_a_prompt_that_is_too_long_is_named_by_its_number_among_all(
    finished: Path, exported: Path, flags: list[str], tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    is_teacher = "--teacher" in flags
    shutil.copytree(teacher_path(finished) if is_teacher else exported, tmp_path / "folder")
    path = tmp_path / "folder" / ("model_config.json" if is_teacher else "config.json")
    fields = json.loads(path.read_text())
    fields["backbone"]["max_position_embeddings"] = 5
    path.write_text(json.dumps(fields))
    command = ["--load", str(tmp_path / "folder"), "--max-new-bytes", "2", *flags]
    for prompt in ("a", "b", "the old house " * 8, "c"):
        command += ["--prompt", prompt]
    with world():
        assert main(command) == 2
    error = capsysbinary.readouterr().err.decode()
    assert "the prompt 3 of 4 is too long" in error and "fill the 5 positions" in error
    assert f"each {'token' if is_teacher else 'chunk'} takes one" in error


@pytest.mark.parametrize("more", [["--speculate", "4"], ["--speculate", "auto"], ["--kernels", "reference"]])
def test_drafts_and_kernels_change_no_text(
    exported: Path, capsysbinary: pytest.CaptureFixture[bytes], more: list[str]
) -> None:
    command = ["--load", str(exported), "--prompt", "the", "--prompt", "a hill", "--max-new-bytes", "30"]
    assert main(command) == 0
    plain = capsysbinary.readouterr().out
    assert main([*command, *more, "--batch-size", "1"]) == 0
    assert capsysbinary.readouterr().out == plain
    assert main([*command, *more, "--stream"]) == 0
    assert capsysbinary.readouterr().out == plain


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_the_teacher_writes_what_the_api_does(
    finished: Path, temperature: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["--teacher", "--max-new-bytes", "20", "--temperature", temperature, "--top-k", "40", "--seed", "4"]
    with world():
        teacher = load_run_teacher(finished)
        settings = GenerationSettings(
            max_new_bytes=20, sampling=Sampling(temperature=float(temperature), top_k=40), seed=4
        )
        running = TeacherGeneration(teacher.backbone, teacher.token_bytes, ["the o"], settings)
        for _ in running:
            pass
        wanted = b"the o" + running.results()[0].byte_ids + b"\n"
        for folder in (finished, teacher_path(finished)):
            assert main(["--load", str(folder), "--prompt", "the o", *command]) == 0
            output = capsysbinary.readouterr()
            assert output.out == wanted and b"bytes per token" in output.err
        assert main(["--load", str(finished), "--prompt", "the o", "--prompt", "", *command]) == 0
    assert capsysbinary.readouterr().out.split(b"---\n")[1].startswith(wanted)


def test_flags_of_students_are_refused_beside_the_teacher(
    finished: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stage", "2a", "--scoring", "official", "--path-window", "8", "--generation", "bytes"]
    flags += ["--boundary-threshold", "0.5", "--utf8", "constrain", "--speculate", "4", "--kernels", "fused"]
    assert main(["--load", str(finished), "--teacher", "--prompt", "a", *flags]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "is for students" in line]
    assert [line.split(": ")[1] for line in told] == flags[::2]
    assert all(line.endswith(f"beside --teacher leave {flag} out") for line, flag in zip(told, flags[::2], strict=True))
    for folder, says in (
        (finished / "2a", "is a stage of a run, and all of them have one teacher"),
        (exported, "is an exported student, which has no teacher"),
        (Path("examples/tiny/teacher"), "not converted; convert it with tools/convert_checkpoint.py import"),
        (finished / "nowhere", "is not a folder"),
    ):
        assert main(["--load", str(folder), "--teacher", "--prompt", "a"]) == 2
        assert says in capsys.readouterr().err
