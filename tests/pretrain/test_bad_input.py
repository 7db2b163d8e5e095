"""What is wrong is said in one message: what was got, what was expected, what to do; the exit code is not zero."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.pretrain.job import SCRIPT, Job, environment, metrics, torchrun, weights, write_data, write_teacher
from tests.pretrain.job import write_tokenizer as write_another_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def refused(job: Job, run: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs the job with more flags, which must fail with a message that holds every given part."""

    def refused(*flags: str, says: tuple[str, ...], code: int = 2) -> str:
        capsys.readouterr()
        assert job.run(run, *flags) == code
        message = capsys.readouterr().err
        assert message.count("error") >= 1 and "Traceback" not in message
        missing = [part for part in says if part not in message]
        assert not missing, (missing, message)
        return message

    return refused


def copy_of_data(stem: str, folder: Path) -> str:
    source = Path(stem)
    folder.mkdir()
    for file in source.parent.glob(f"{source.name.removesuffix('_document')}*"):
        shutil.copy(file, folder / file.name)
    return str(folder / source.name)


def test_a_teacher_that_is_not_a_directory(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--load", str(tmp_path / "nowhere"), says=("nowhere", "does not exist"))
    file = tmp_path / "file"
    file.write_text("x")
    refused("--load", str(file), says=(str(file), "not a directory"))
    refused("--load", str(tmp_path), says=(str(tmp_path), "model_config.json"))


def test_a_teacher_without_its_tokenizer(refused, job: Job, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    teacher = tmp_path / "teacher"
    shutil.copytree(job.teacher, teacher)
    shutil.rmtree(teacher / "tokenizer")
    refused("--load", str(teacher), says=("token_bytes.npz", "not a readable token table"))


def test_a_teacher_without_its_weights(refused, job: Job, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    teacher = tmp_path / "teacher"
    shutil.copytree(job.teacher, teacher)
    shutil.rmtree(teacher / "iter_0000000")
    refused("--load", str(teacher), says=("iter_0000000", "missing or incomplete"))


def test_data_made_with_another_tokenizer(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = write_another_tokenizer(tmp_path / "other", words=["completely", "different", "vocabulary"], size=280)
    stem = write_data(tmp_path / "data", tokenizer, seed=5, documents=3)
    refused("--train-data-path", stem, says=(stem, "made with another tokenizer", "preprocess"))


def test_missing_data(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stem = str(tmp_path / "nothing_text_document")
    refused("--train-data-path", stem, says=(stem, "no such file"))


def test_tokens_that_do_not_rebuild_the_document(refused, job: Job, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    stem = copy_of_data(job.train, tmp_path / "data")
    [tokens] = list(Path(stem).parent.glob("*tokens.bin"))
    content = bytearray(tokens.read_bytes())
    content[40] = content[40] ^ 1  # one token of the first document
    tokens.write_bytes(bytes(content))
    refused("--train-data-path", stem, "--stages", "1a", "--train-iters", "40", says=("document", stem))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_a_truncated_file(refused, job: Job, tmp_path: Path, ending: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    stem = copy_of_data(job.train, tmp_path / "data")
    [damaged] = [p for p in Path(stem).parent.glob(f"*{ending}") if ("token" in p.name) == (kind == "tokens")]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    refused("--train-data-path", stem, says=(damaged.name, "truncated"))


@pytest.fixture
def begun(job: Job, run: Path) -> Path:
    """A run that was stopped inside 1a."""
    assert job.run(run, "--stages", "1a", "--exit-interval", "2") == 0
    return run


def test_another_width_than_the_checkpoint(refused, begun: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--byte-width", "48", says=("byte_width: 32 there, 48 now", "--fresh"))


def test_settings_of_parts_that_are_not_there_make_no_other_model(refused, begun: Path, job: Job) -> None:  # type: ignore[no-untyped-def]
    """As a run that a version before local attention and the linear router made."""
    path = begun / "model_config.json"
    content = json.loads(path.read_text())
    for name in ("router", "byte_attention_window", "byte_attention_head_dim"):
        del content["byte_side"][name]
    content["byte_side"] |= {"mamba_state_dim": 24, "byte_ngram_rows": 7}
    path.write_text(json.dumps(content))
    assert job.run(begun, "--stages", "1a", "--exit-interval", "2") == 0
    refused("--conv-kernel", "3", says=("conv_kernel: 4 there, 3 now",))


def test_more_alignment_layers_than_the_teacher_has(refused) -> None:  # type: ignore[no-untyped-def]
    refused("--align-layers", "3", says=("cannot be cut so: --align-layers 3 is more than the 2 layers",))


def test_another_teacher_width_and_vocabulary_than_the_checkpoint(  # type: ignore[no-untyped-def]
    refused, begun: Path, job: Job, tmp_path: Path
) -> None:
    wide = write_teacher(tmp_path / "wide", job.tokenizer, width=48)
    refused("--load", str(wide), says=("hidden_size: 32 there, 48 now",))
    many = write_teacher(tmp_path / "many", job.tokenizer, vocab_size=320)
    refused("--load", str(many), says=("vocab_size: 300 there, 320 now",))


def test_another_tokenizer_than_the_checkpoint(refused, begun: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tokenizer = write_another_tokenizer(tmp_path / "other", words=["another", "town"] * 3, size=270)
    teacher = write_teacher(tmp_path / "teacher", tokenizer)
    refused("--load", str(teacher), says=("another tokenizer", "--fresh"))


def test_another_row_length_than_the_checkpoint(refused, begun: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--seq-length", "512", says=("row_bytes: saved 256, now 512",))


def test_rows_shorter_than_a_token(refused) -> None:  # type: ignore[no-untyped-def]
    refused("--seq-length", "2", says=("longer than a row of 2 bytes", "use longer rows"))


def test_a_stage_after_one_that_was_left_incomplete(refused, begun: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--stages", "1b", says=("stage 1b builds on 1a", "iteration 2 of 4", "--stages 1a,1b"))


def test_a_preset_of_another_teacher(refused) -> None:  # type: ignore[no-untyped-def]
    refused("--preset", "llama3.2-3b", says=("hidden size is 32", "3072", "choose the preset"))


def test_contradictions_are_reported_together(refused) -> None:  # type: ignore[no-untyped-def]
    refused(
        "--mock-data", "--lr", "-1", "--stages", "1b,1a", "--min-lr", "0.1", "--min-lr-ratio", "0.5", "--lrr", "3",
        says=("1.", "5.", "--mock-data and", "--lr: got -1", "the order is 1a,1b", "same thing twice", "did you mean"),
    )  # fmt: skip


def test_a_run_folder_that_is_the_teachers_or_no_folder(refused, job: Job, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--save", str(job.teacher), says=("the teacher's own folder",))
    file = tmp_path / "file"
    file.write_text("x")
    refused("--save", str(file), says=(str(file), "exists"), code=1)


def test_fresh_keeps_the_old_run_until_the_teacher_is_known(refused, begun: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    refused("--fresh", "--load", str(tmp_path / "nowhere"), says=("does not exist",))
    assert (begun / "1a" / "iter_0000002").is_dir()
    refused("--fresh", "--load", str(begun), says=("--fresh",))
    assert (begun / "1a" / "iter_0000002").is_dir()


def test_a_damaged_checkpoint_is_named(refused, begun: Path) -> None:  # type: ignore[no-untyped-def]
    checkpoint = begun / "1a" / "iter_0000002"
    shards = sorted(checkpoint.glob("*.distcp"))
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    refused(says=(str(checkpoint), "is damaged", f"{shards[0].name} has", "bytes instead of", "no earlier one"))
    (checkpoint / "loop_state.json").write_text("{")
    refused(says=("loop_state.json", "cannot be read"))


def test_a_teacher_that_changed_since_its_conversion_is_named_unless_nobody_looks(  # type: ignore[no-untyped-def]
    refused, job: Job, run: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(job.teacher, teacher)
    state = teacher / "iter_0000000" / "loop_state.json"
    state.write_text(state.read_text().replace("\n", " ", 1))
    flags = ("--load", str(teacher), "--stages", "1a", "--train-iters", "1")
    refused(*flags, says=("iter_0000000 is damaged", "loop_state.json has changed since", "copy it again"))
    assert job.run(run, *flags, "--no-verify-checkpoint") == 0


def test_a_second_job_on_the_same_folder_is_refused(job: Job, run: Path) -> None:
    from megabyte_distill.pretrain.run_lock import only_job

    with only_job(run):
        done = subprocess.run(
            torchrun(str(SCRIPT), *job.flags(run)), capture_output=True, text=True, env=environment(), check=False
        )
    assert done.returncode != 0
    assert "another job (process" in done.stderr
    # torchrun's own report comes last; it ends with our message
    assert "another job (process" in done.stderr[-900:]


def test_nan_stops_the_run_names_the_batch_and_keeps_the_checkpoint_finite(  # type: ignore[no-untyped-def]
    refused, run: Path
) -> None:
    refused(
        "--1a.lr", "1e30", "--1a.train-iters", "30", "--1a.save-interval", "0", "--max-nan-iterations", "2",
        says=("1a: 2 updates in a row", "the weight byte_encoder.", "its batch:", "document", "--max-nan-iterations"),
        code=1,
    )  # fmt: skip
    refused(
        "--1a.lr", "1e30", "--1a.train-iters", "30", "--1a.save-interval", "1", "--async-save",
        says=("stage 1a: ", "weights are NaN or infinite after iteration", "its batch:", "document"),
        code=1,
    )  # fmt: skip
    assert not list(run.glob("*/*.incomplete")), "a save that was under way is finished"
    seen = metrics(run)
    assert None in seen.values(), "what is not finite is null"
    latest = int((run / "1a" / "latest_checkpointed_iteration.txt").read_text())
    assert all(bool(value.isfinite().all()) for value in weights(run, "1a", latest).values())


def test_a_full_disk_during_a_save_leaves_the_old_checkpoint(job: Job, finished: Path, run: Path) -> None:
    from tests.pretrain.job import assert_same_run

    assert job.run(run, "--exit-interval", "2") == 0
    before = (run / "1a" / "latest_checkpointed_iteration.txt").read_text()
    limited = f'ulimit -f 40; exec python3 {SCRIPT} "$@"'  # in blocks of 1024 bytes: less than a checkpoint's shard
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *job.flags(run)], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode != 0
    assert "saving" in done.stderr and "earlier checkpoints are untouched" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (run / "1a" / "latest_checkpointed_iteration.txt").read_text() == before
    assert not list(run.glob("*/*.incomplete"))
    assert job.run(run) == 0
    assert_same_run(run, finished)
