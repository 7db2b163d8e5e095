"""The tools' command lines: mistakes in the terms of who typed them, all together, before anything slow is imported."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabyte_distill import __version__
from megabyte_distill.tool import run_tool
from tests.pretrain.job import environment

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "generate",
    "evaluate",
    "plot_run",
    "convert_checkpoint",
    "preprocess_bytes",
    "cache_teacher",
    "train_teacher",
)
GENERATE = ["generate", "--load", "{run}", "--prompt", "a"]
EVALUATE = ["evaluate", "--load", "{run}", "--data-path", "{set}"]
CACHE = ["cache_teacher", "--load", "{run}", "--data-path", "{set}", "--logits-save-dir", "out"]
EXPORT = ["convert_checkpoint", "export", "--megatron-path", "{run}", "--hf-path", "out"]
PREPROCESS = ["preprocess_bytes", "--input", "x", "--output-prefix", "y"]
EXACT = "scripts.check_exact_targets"
TRAIN = ["train_teacher", "--input", "x", "--valid-input", "y", "--work-dir", "w", "--hf-path", "h"]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Folders that look like a run, an export and a data set from outside; what opens one of them fails."""
    for name in ("run/2a", "export", "empty", "teacher"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run" / "teacher.json").write_text(json.dumps({"teacher": str(tmp_path / "teacher")}))
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "teacher.json").write_text(json.dumps({"teacher": str(tmp_path / "gone")}))
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "teacher" / "model_config.json").write_text("{}")
    (tmp_path / "is_text_document.json").write_text("{}")
    places = {name: str(tmp_path / name) for name in ("run", "moved", "export", "empty", "teacher")}
    return {**places, "tmp": str(tmp_path), "set": str(tmp_path / "is_text_document")}


def refused(words: list[str], places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a tool says of a command line that it refuses, without "error: "."""
    tool, *argv = (word.format(**places) for word in words)
    try:
        code = importlib.import_module(tool if "." in tool else f"tools.{tool}").main(argv)
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert code == 2 and not output.out and all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GENERATE, "--speculate", "foo"], "--speculate: got 'foo', expected a whole number of at least 0, or auto"),
        ([*GENERATE, "--speculate", "-1"], "--speculate: got -1, expected a whole number of at least 0, or auto"),
        (
            [*GENERATE, "--boundary-threshold", "x"],
            "--boundary-threshold: got 'x', expected a number above 0 and below",
        ),
        (
            [*GENERATE, "--boundary-threshold", "1"],
            "--boundary-threshold: got 1, expected a number above 0 and below 1",
        ),
        ([*GENERATE, "--stop", ""], "--stop: got '', expected a text of at least one byte; leave the flag out"),
        ([*GENERATE, "--temperature", "nan"], "--temperature: got nan, expected a number of at least 0 (0 is greedy)"),
        ([*GENERATE, "--top-p", "1.5"], "--top-p: got 1.5, expected a number above 0 and at most 1 (1 keeps all)"),
        ([*GENERATE, "--top-k", "2.5"], "--top-k: got '2.5', expected a whole number of at least 0 (0 keeps all)"),
        ([*GENERATE, "--min-p", "2"], "--min-p: got 2, expected a number of at least 0 and at most 1 (0 keeps all)"),
        ([*GENERATE, "--max-new-bytes", "-1"], "--max-new-bytes: got -1, expected a whole number of at least 0"),
        ([*GENERATE, "--batch-size", "0"], "--batch-size: got 0, expected a whole number of at least 1"),
        ([*GENERATE, "--paths", "0"], "--paths: got 0, expected a whole number of at least 1"),
        ([*GENERATE, "--path-window", "0"], "--path-window: got 0, expected a whole number of at least 1"),
        ([*GENERATE, "--seed", "-1"], "--seed: got -1, expected a whole number of at least 0"),
        ([*GENERATE, "--utf8", "x"], "--utf8: got 'x', expected raw or constrain"),
        (
            [*GENERATE, "--stage", "1c"],
            "--stage: got '1c', expected 2a or 2b or 3a; earlier stages leave the decoder untrained",
        ),
        ([*GENERATE, "--stage", "2b"], "--stage: {run} has no stage 2b; it has 2a: take one of these, or train it"),
        ([*GENERATE, "--load", "{export}", "--stage", "2a"], "--stage: {export} is an export, which holds the weights"),
        ([*GENERATE, "--load", "{empty}"], "--load: {empty} is not a run and not an exported student; expected a"),
        ([*GENERATE, "--load", "{tmp}/no"], "--load: {tmp}/no is not a folder, no run and not an exported student;"),
        ([*GENERATE, "--load", "{teacher}"], "--load: {teacher} is a converted teacher and not an exported student"),
        ([*GENERATE[:3], "--prompt-file", "{tmp}/no"], "--prompt-file: got '{tmp}/no', expected a file; there is none"),
        ([*GENERATE[:3], "--prompt-file", "{tmp}"], "--prompt-file: got '{tmp}', expected a file; it is a folder"),
        ([*GENERATE, "--prompt", "ab\udcff"], "--prompt: the prompt 2 of 2 has byte 255 (0xFF) at offset 2"),
        ([*GENERATE[:4], "\udcfe"], "--prompt: the prompt has byte 254 (0xFE) at offset 0"),
        (
            [*GENERATE, "--generation", "bytes", "--speculate", "4"],
            "--speculate: got 4, which is for --generation joint",
        ),
        ([*GENERATE, "--generation", "bytes", "--kernels", "fused"], "--kernels: got fused, which is for --generation"),
        ([*GENERATE, "--generation", "bytes", "--scoring", "official"], "--scoring official: reads a prompt along one"),
        (
            [*GENERATE, "--generation", "bytes", "--boundary-threshold", "0.5"],
            "--boundary-threshold: decides bits, and",
        ),
        ([*GENERATE, "--scoring", "official", "--paths", "5"], "--paths: --scoring official reads along one path"),
        ([*GENERATE, "--stream", "--batch-size", "9"], "--batch-size: --stream and --interactive run one prompt at a"),
        (
            [*GENERATE, "--stream", "--show-boundaries", "--generation", "bytes"],
            "--stream: with --generation bytes --show-boundaries knows the bits at the end",
        ),
        ([*GENERATE, "--frob", "3"], "--frob 3: no flag, and no flag takes it; --help lists them"),
        ([*GENERATE, "--temp", "0"], "--temp 0: no flag, and no flag takes it; --help lists them"),
        ([*GENERATE, "--stopp", "."], "--stopp .: no flag, and no flag takes it; did you mean --stop?"),
        (GENERATE[:3], "--prompt or --prompt-file or --interactive: missing, and required; --help says what it is"),
        (["plot_run"], "RUN: missing, and required"),
        (["convert_checkpoint"], "{{import,export,compare,roundtrip}}: missing, and required"),
        (
            [*EVALUATE, "--boundary-threshold", "0"],
            "--boundary-threshold: got 0, expected a number above 0 and below 1",
        ),
        ([*EVALUATE, "--boundary-thresholds", "0.3,2"], "--boundary-thresholds: got 2, expected a number above 0 and"),
        ([*EVALUATE, "--max-bytes", "-1"], "--max-bytes: got -1, expected a whole number of at least 1"),
        ([*EVALUATE, "--max-documents", "0"], "--max-documents: got 0, expected a whole number of at least 1"),
        ([*EVALUATE, "--seq-length", "1"], "--seq-length: got 1, expected a whole number of at least 2"),
        ([*EVALUATE, "--confidence", "2"], "--confidence: got 2, expected a number above 0 and below 1"),
        ([*EVALUATE, "--split", "x"], "--split: got 'x', expected up to three numbers from 0 up, such as 969,30,1"),
        ([*EVALUATE, "--suite-texts", "3"], "--suite-texts: only --suite robustness reads it; give that, or leave"),
        (
            [*EVALUATE, "--suite", "robustness", "--suite-texts", "0"],
            "--suite-texts: got 0, expected a whole number of",
        ),
        (
            [*EVALUATE, "--suite", "robustness", "--paths", "0"],
            "--paths: got 0, expected at least 1; --suite robustness",
        ),
        (
            [*EVALUATE, "--suite", "robustness", "--max-bytes", "100"],
            "--max-bytes: only --suite heldout reads it; give that, or leave --max-bytes out",
        ),
        (
            [*EVALUATE, "--paths", "0", "--path-bytes", "9"],
            "--path-bytes: is for the figures by --paths, which --paths 0",
        ),
        (
            [*EVALUATE, "--resamples", "0", "--confidence", "0.9"],
            "--confidence: is for the intervals, which --resamples 0",
        ),
        ([*EVALUATE, "--stage", "2b"], "--stage: {run} has no stage 2b"),
        (
            [*EVALUATE, "--load", "{run}/2a"],
            "--load: {run}/2a is a stage of a run; give the run's own folder, {run}, which has 2a (--stage",
        ),
        ([*EVALUATE, "--load", "{run}", "{run}"], "--load: got {run} {run}, expected each run once"),
        ([*EVALUATE, "--load", "{moved}"], "--teacher: the teacher of {moved} should be at {tmp}/gone"),
        ([*EVALUATE, "--teacher", "{tmp}/no"], "--teacher: got '{tmp}/no', expected a folder; there is none"),
        ([*EVALUATE, "--data-path", "{tmp}/no_text_document"], "--data-path: got {tmp}/no_text_document, expected the"),
        ([*EVALUATE, "--data-path", "a={set}", "a={set}"], "--data-path: two data sets are called 'a'"),
        ([*EVALUATE, "--train-data-path", "{tmp}/no_text_document"], "--train-data-path: got {tmp}/no_text_document"),
        ([*EVALUATE, "--plots", "{set}.json"], "--plots: got '{set}.json', expected a folder, which may be new"),
        (["plot_run", "{run}", "--output", "{set}.json"], "--output: got '{set}.json', expected a folder, which may"),
        (["plot_run", "{run}", "--text-bytes", "x"], "--text-bytes: got 'x', expected a whole number of at least 0"),
        (["plot_run", "{run}", "--data-path", "{tmp}/no_document"], "--data-path: got {tmp}/no_document, expected the"),
        (["plot_run", "{run}", "--no-model", "--text-bytes", "9"], "--text-bytes: --no-model leaves the page out"),
        (["plot_run", "{run}", "--data-path", "{set}", "--text-bytes", "0"], "--data-path: --text-bytes 0 leaves the"),
        ([*EXPORT, "--boundary-threshold", "1"], "--boundary-threshold: got 1, expected a number above 0 and below 1"),
        ([*EXPORT, "--torch-dtype", "int8"], "--torch-dtype: got 'int8', expected float32 or bfloat16 or float16"),
        ([*EXPORT, "--teacher", "--paths", "2"], "--paths: belongs to a student's byte model; leave it out"),
        ([*EXPORT, "--megatron-path", "{empty}"], "--megatron-path: {empty} is not a run"),
        ([*EXPORT, "--teacher", "--megatron-path", "{tmp}/no"], "--megatron-path: got '{tmp}/no', expected a folder"),
        (
            ["convert_checkpoint", "roundtrip", "--hf-model", "{tmp}/no"],
            "--hf-model: {tmp}/no does not exist; expected",
        ),
        ([*PREPROCESS, "--on-invalid", "x"], "--on-invalid: got 'x', expected error or skip or replace"),
        ([*PREPROCESS, "--workers", "0"], "--workers: got 0, expected a whole number of at least 1"),
        (["preprocess_bytes", "inspect", "x", "--document", "-1"], "--document: got -1, expected a whole number of"),
        ([*CACHE, "--logits-save-top-k", "513"], "--logits-save-top-k: got 513, expected a whole number of at least 1"),
        ([*CACHE, "--load", "{tmp}/no"], "--load: got '{tmp}/no', expected a folder; there is none"),
        ([*CACHE, "--data-path", "0.3", "{tmp}/no_document"], "--data-path: got {tmp}/no_document, expected the stem"),
        ([EXACT], "--tokenizer: missing, and so is --load with --data-path; give one of the two"),
        ([EXACT, "--tokenizer", "x", "--load", "y"], "--data-path: missing; it names the text of the teacher --load"),
        ([EXACT, "--tokenizer", "x", "--data-path", "y"], "--load: missing; --data-path is its text, which"),
        ([EXACT, "--data-path", "y"], "--load: missing; --data-path is its text, which"),
        ([*TRAIN, "--lr", "0"], "--lr: got 0, expected a number above 0"),
        ([*TRAIN, "--num-layers", "x"], "--num-layers: got 'x', expected a whole number of at least 1"),
    ],
)
def test_a_mistake_is_told_by_its_flag_with_what_was_got_and_what_is_expected(
    words: list[str], message: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    [line] = refused(words, places, capsys)
    assert line.startswith(message.format(**places))


def test_all_mistakes_are_told_together(places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, flags in (
        (
            [
                "generate",
                "--load",
                "{tmp}/no",
                "--prompt",
                "\udcff",
                "--top-p",
                "2",
                "--stop",
                "",
                "--stop",
                "a",
                "--x",
            ],
            ("--x", "--top-p", "--stop", "--load", "--prompt"),
        ),
        (
            [*EVALUATE, "--data-path", "{tmp}/a_document", "{tmp}/b_document", "--paths", "x", "--suite-samples", "2"],
            ("--paths", "--data-path", "--data-path", "--suite-samples"),
        ),
        (
            ["generate", "--top-p", "2", "--scoring", "official", "--paths", "5"],
            ("--load", "--prompt or --prompt-file or --interactive", "--top-p", "--paths"),
        ),
        (["evaluate", "--paths", "x", "--suite-texts", "3"], ("--load", "--data-path", "--paths", "--suite-texts")),
        (
            ["cache_teacher", "--split", "x", "--load", "{tmp}/no"],
            ("--data-path", "--logits-save-dir", "--load", "--split"),
        ),
        (["plot_run", "--text-bytes", "0", "--data-path", "no"], ("RUN", "--data-path", "--data-path")),
        (
            ["convert_checkpoint", "export", "--teacher", "--paths", "0", "--boundary-threshold", "0.3"],
            ("--megatron-path", "--hf-path", "--paths", "--boundary-threshold"),
        ),
        (["convert_checkpoint", "compare", "--hf-model", "{tmp}/no"], ("--megatron-path", "--hf-model")),
        (["preprocess_bytes", "--workers", "0"], ("--input", "--output-prefix", "--workers")),
        (["preprocess_bytes", "inspect", "--document", "x"], ("output", "--document")),
        (["train_teacher", "--lr", "0"], ("--input", "--valid-input", "--work-dir", "--hf-path", "--lr")),
    ):
        assert [line.split(":")[0] for line in refused(words, places, capsys)] == list(flags)


@pytest.mark.parametrize(
    "words",
    [
        [*GENERATE, "--scoring", "official", "--paths", "4"],
        [*EVALUATE, "--paths", "0", "--tokenizations", "0", "--suite-texts", "12"],
        [*EVALUATE, "--suite", "robustness", "--seq-length", "2048", "--resamples", "0", "--confidence", "0.95"],
        ["plot_run", "{run}", "--no-model", "--text-bytes", "0"],
    ],
    ids=lambda words: words[0],
)
def test_a_flag_that_says_its_default_is_never_in_the_way(words: list[str], places: dict[str, str]) -> None:
    name, *argv = (word.format(**places) for word in words)
    tool, seen = importlib.import_module(f"tools.{name}"), []
    assert run_tool(tool.build_parser(), seen.append, argv, check=tool.check) == 0 and len(seen) == 1


@pytest.mark.parametrize("words", [[*GENERATE, "--top-p", "2"], [*EVALUATE, "--load", "no"], [*CACHE, "--split", "x"],
    ["plot_run", "no"], [*EXPORT, "--paths", "0"], [*PREPROCESS, "--workers", "x"], [*TRAIN, "--seed", "x"]],
    ids=lambda words: words[0])  # fmt: skip
def test_a_mistake_waits_for_no_slow_import(words: list[str], places: dict[str, str]) -> None:
    tool, *argv = (word.format(**places) for word in words)
    program = f"""import sys
from tools.{tool} import main
assert main(sys.argv[1:]) == 2
print(sorted(sys.modules.keys() & {{'torch', 'megatron', 'transformers'}}))"""
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_help_and_version_of_every_tool(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"tools.{tool}").main
    for flag, expected in (("--help", "exit codes: 0 done; 2 mistakes"), ("--version", f"distill {__version__}\n")):
        with pytest.raises(SystemExit) as end:
            main([flag])
        assert end.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "required"),
    [
        (["cache_teacher"], "--load CKPT"),
        (["generate"], "(--prompt TEXT | --prompt-file FILE | --interactive)"),
        (["convert_checkpoint", "compare"], "--hf-model DIR"),
        (["preprocess_bytes", "merge"], "--output-prefix PREFIX"),
    ],
)
def test_help_shows_what_is_required_without_brackets(
    words: list[str], required: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    tool, *argv = words
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{tool}").main([*argv, "--help"])
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert f" {required}" in usage and "--version]" in usage and f"[{required.strip('()')}" not in usage


COMMANDS = (
    *((f"tools.{tool}", "") for tool in TOOLS),
    *(("tools.convert_checkpoint", command) for command in ("import", "export", "compare", "roundtrip")),
    *(("tools.preprocess_bytes", command) for command in ("merge", "verify", "inspect")),
    *((f"scripts.{path.stem}", "") for path in sorted((ROOT / "scripts").glob("check_*.py"))),
    ("megabyte_distill.memory.__main__", ""),
    ("megabyte_distill.kernels.__main__", "build"),
)


@pytest.mark.parametrize(("module", "command"), COMMANDS, ids=lambda words: words.rpartition(".")[2])
def test_every_flag_stands_in_a_group_with_its_default_and_what_it_takes(module: str, command: str) -> None:
    tool = importlib.import_module(module)
    parser = tool.build_parser(command) if module == "tools.preprocess_bytes" else tool.build_parser()
    if command and module != "tools.preprocess_bytes":
        parser = next(action for action in parser._actions if action.dest == "command").choices[command]
    flags = [action for action in parser._actions if action.option_strings and action.dest not in ("help", "version")]
    names = {action: action.option_strings[0] for action in flags}
    ungrouped = {names[action] for action in flags if action in parser._optionals._group_actions}
    takes_a_value = [action for action in flags if action.nargs != 0]
    silent = {names[action] for action in takes_a_value if not action.required and "(" not in (action.help or "")}
    without_kind = {names[action] for action in takes_a_value if not action.metavar}
    assert not ungrouped and not without_kind
    assert silent <= {"--prompt", "--prompt-file"}, "of which one is required"
