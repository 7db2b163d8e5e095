"""Training from a target cache is training beside the teacher, within what was cut off; a wrong cache is refused."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.files import partial_path
from megabyte_distill.training import target_cache
from megabyte_distill.training.target_cache import IDENTITY_FILE, TargetCache
from tests.data.preprocessing import preprocess
from tests.pretrain.job import ROOT, WORDS, Job, metrics, run_as_ranks, run_command, weights, write_data, write_teacher
from tools.cache_teacher import main

ROW_BYTES = 256
STAGES = ("--stages", "2a,2b", "--byte-targets", "exact", "--boundary-source", "gold")
CUT = "日本語 🙂 é"


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents each of which fills a row, so that none is cut: the teacher's context is the same both ways."""
    choose = random.Random(4)
    lines = []
    for _ in range(12):
        text = CUT
        while len(text.encode()) < 243:
            text += " " + choose.choice(WORDS)
        lines.append(json.dumps({"text": text}))
        assert 240 <= len(text.encode()) <= ROW_BYTES - 1
    source = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    source.write_text("\n".join(lines) + "\n")
    prefix = source.with_suffix("")
    return preprocess([source], output_prefix=prefix, tokenizer_model=job.tokenizer).stems["text"]


def cache_flags(job: Job, stem: str, folder: Path, *more: str) -> list[str]:
    flags = ["--load", str(job.teacher), "--data-path", stem, "--logits-save-dir", str(folder), "--shard-bytes", "700"]
    return [*flags, *more]


@pytest.fixture(scope="module")
def make(job: Job, whole: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A cache of ``whole`` with so many pairs a byte, made once."""
    made: dict[int, Path] = {}

    def make(top_k: int) -> Path:
        if top_k not in made:
            made[top_k] = tmp_path_factory.mktemp("caches") / str(top_k)
            assert main(cache_flags(job, whole, made[top_k], "--logits-save-top-k", str(top_k))) == 0
        return made[top_k]

    return make


def train(job: Job, stem: str, run: Path, *more: str) -> int:
    return job.run(run, *STAGES, "--train-data-path", stem, "--seq-length", str(ROW_BYTES), "--eval-iters", "0", *more)


@pytest.mark.parametrize(("top_k", "tolerance"), [(512, 2e-4), (32, 1e-2)])
@pytest.mark.parametrize(
    "targets", [(), ("--byte-targets", "mixed", "--kd-loss-alpha", "0.3", "--kd-temperature", "2")]
)
def test_losses_are_those_of_online_training(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path, top_k: int, tolerance: float,
    targets: tuple[str, ...],
) -> None:  # fmt: skip
    online, cached = tmp_path / "online", tmp_path / "cached"
    assert train(job, whole, online, *targets) == 0
    assert train(job, whole, cached, *targets, "--logits-load-dir", str(make(top_k)), "--micro-batch-size", "2") == 0
    ours, theirs = metrics(cached), metrics(online)
    compared = [key for key in ours if key[2] in ("byte ce", "joint bits per byte", "grad norm")]
    assert len(compared) >= 3 * 8
    for key in compared:
        wide = 5 if key[2] == "grad norm" else 1
        assert ours[key] == pytest.approx(theirs[key], rel=wide * tolerance), key


def test_the_teachers_weights_are_not_read(job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(job.teacher, teacher)
    flags = ("--load", str(teacher), "--logits-load-dir", str(make(32)))
    assert train(job, whole, run, *flags, "--stages", "2a") == 0
    for file in teacher.glob("iter_*/*.distcp"):
        file.unlink()
    assert train(job, whole, run, *flags, "--stages", "2b") == 0
    assert train(job, whole, tmp_path / "other", "--load", str(teacher), "--stages", "2b") != 0


def test_another_order_and_row_length_is_served_by_the_same_cache(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path
) -> None:
    flags = ("--logits-load-dir", str(make(32)), "--seq-length", "100", "--seed", "9", "--chunk-bucket", "8")
    assert train(job, whole, tmp_path / "run", *flags) == 0
    assert all(0 < value < 20 for key, value in metrics(tmp_path / "run").items() if key[2] == "byte ce")


def files_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir()}


def test_killed_at_any_moment_the_same_command_ends_with_the_same_files(job: Job, whole: str, tmp_path: Path) -> None:
    wanted, folder = tmp_path / "wanted", tmp_path / "cache"
    assert main(cache_flags(job, whole, wanted)) == 0
    flags = cache_flags(job, whole, folder)
    done = run_command([sys.executable, "-m", "tests.pretrain.cache_killer", str(folder), "4", "2", *flags])
    assert done.returncode == 0, done.stderr
    assert files_of(folder) == files_of(wanted)


def test_killed_before_its_identity_is_published_the_same_command_goes_on(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path
) -> None:
    partial_path(tmp_path / IDENTITY_FILE).write_text("{")
    assert main(cache_flags(job, whole, tmp_path)) == 0
    assert files_of(tmp_path) == files_of(make(32))


def test_two_ranks_share_the_work_and_write_the_same_files(job: Job, whole: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(cache_flags(job, whole, one)) == 0
    command = [str(ROOT / "tools" / "cache_teacher.py"), *cache_flags(job, whole, two, "--json")]
    done = run_as_ranks(*command, processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["shards_made"] == len(list(two.glob("*.bin")))
    assert "[0] shard_000000: " in done.stderr and "[1] shard_000001: " in done.stderr
    assert files_of(one) == files_of(two)


def test_contexts_go_on_from_window_to_window(job: Job, whole: str, tmp_path: Path) -> None:
    """Windows of few tokens: every target is there once, and those of a document's first window are the same."""
    whole_context, windows = tmp_path / "whole", tmp_path / "windows"
    keep_all = ("--logits-save-top-k", "512")
    assert main(cache_flags(job, whole, whole_context, *keep_all)) == 0
    assert main(cache_flags(job, whole, windows, *keep_all, "--context-tokens", "40", "--overlap-tokens", "7")) == 0
    dataset = ByteTokenDataset(whole)
    expected, found = TargetCache(whole_context), TargetCache(windows)
    for document in range(len(dataset)):
        content = dataset[document]
        last = content.byte_ids.size
        ends = content.bits.nonzero()[0] + 1  # the first bytes behind tokens
        one, other = (cache.of_bytes(dataset.digest, document, 0, last) for cache in (expected, found))
        assert one.counts.shape[0] == last + 1 and int(one.counts.min()) >= 1
        same = int(ends[39])  # the boundary behind the fortieth token is still predicted by the first window
        first = int(one.counts[: same + 1].sum())
        assert one.counts[: same + 1].equal(other.counts[: same + 1])
        difference = (one.probabilities[:first].float() - other.probabilities[:first].float()).abs()
        assert float(difference.max()) < 1e-3
        assert int((one.counts - other.counts).abs().sum()) == 0  # what is possible depends on the text alone
        assert not one.probabilities.equal(other.probabilities)
        middle = found.of_bytes(dataset.digest, document, 17, 60)
        assert middle.counts.equal(other.counts[17:61])
        entries = slice(int(other.counts[:17].sum()), int(other.counts[:61].sum()))
        assert middle.probabilities.equal(other.probabilities[entries]) and middle.tail.equal(other.tail[17:61])


def mapped(folder: Path) -> int:
    """Shards of a cache that this process has mapped, as often as it has."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/shard_")


def test_few_shards_are_open_at_once_and_each_is_hashed_once(
    whole: str, make: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, whole_cache = ByteTokenDataset(whole), TargetCache(make(32))
    wanted = [whole_cache.of_bytes(dataset.digest, document, 0, 200) for document in range(len(dataset))]
    monkeypatch.setattr(target_cache, "_OPEN_SHARDS", 2)
    cache = TargetCache(make(32))
    hashed: list[str] = []
    monkeypatch.setattr(cache, "_check", hashed.append)
    assert len(cache.shards) > 3
    gc.collect()  # of caches that other tests opened
    before = mapped(cache.folder)
    for document, other in [*enumerate(wanted)] * 2:
        one = cache.of_bytes(dataset.digest, document, 0, 200)
        assert one.counts.equal(other.counts) and one.probabilities.equal(other.probabilities)
        assert mapped(cache.folder) <= before + 2
    assert hashed == [f"{shard.name}.bin" for shard in cache.shards]


@pytest.fixture
def refused(job: Job, whole: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def refused(*flags: str, says: str) -> None:
        capsys.readouterr()
        assert train(job, whole, tmp_path / "refused", "--fresh", *flags) == 2
        message = capsys.readouterr().err
        assert says in message and "Traceback" not in message, message

    return refused


def test_a_cache_that_does_not_fit_is_refused(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path, refused: Callable[..., None]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(make(32), cache)
    load = ("--logits-load-dir", str(cache))
    other_teacher = write_teacher(tmp_path / "teacher", job.tokenizer, width=64)
    refused(*load, "--load", str(other_teacher), says="its teacher is ")
    refused(*load, "--train-data-path", job.train, says=f"it knows nothing of {job.train}")
    refused("--logits-load-dir", str(tmp_path / "none"), says="is no target cache")
    refused(*load, "--byte-targets", "hard", says="which is hard here")
    refused("--logits-load-dir", str(tmp_path), says="is no target cache")
    shard = cache / "shard_000001.bin"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    refused(*load, says="shard_000001.bin has changed since it was written")
    shard.write_bytes(content[:-1])
    refused(*load, says=f"instead of {len(content):,}")
    shard.unlink()
    refused(*load, says="shard_000001.bin is missing")
    (cache / "manifest.json").unlink()
    refused(*load, says="is not complete: start tools/cache_teacher.py again")


def test_the_tool_refuses_what_it_cannot_do(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = write_data(tmp_path / "short", job.tokenizer, seed=3, documents=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    for flags, message in (
        (cache_flags(job, whole, make(32), "--logits-save-top-k", "16"), "top_k: 32 there, 16 now"),
        (
            cache_flags(job, whole, tmp_path / "c", "--logits-save-top-k", "0"),
            "--logits-save-top-k: got 0, expected a whole number of at least 1 and at most 512",
        ),
        (cache_flags(job, whole, tmp_path / "c", "--overlap-tokens", "5000"), "--overlap-tokens 5000"),
        (
            cache_flags(job, whole, tmp_path / "c", "--context-tokens", "2048"),
            "--context-tokens: got 2048, expected at most 2047; the teacher has 2048 positions",
        ),
        (cache_flags(job, whole, tmp_path / "full"), "is not empty and holds no target cache"),
        (cache_flags(job, short, tmp_path / "c", "--split", "0,1,0"), "no documents"),
        (cache_flags(job, "nothing_text_document", tmp_path / "c"), "nothing_text_document"),
    ):
        capsys.readouterr()
        assert main(flags) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error, error


def test_a_complete_cache_is_verified_and_reported(
    job: Job, whole: str, make: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(32)
    capsys.readouterr()
    assert main(cache_flags(job, whole, folder, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shards_made"] == 0 and report["shards"] == len(list(folder.glob("shard_*.bin"))) > 3
    size = sum(path.stat().st_size for path in folder.iterdir()) - (folder / "manifest.json").stat().st_size
    assert report["cache_bytes"] == size and report["documents"] == 12
    assert 4 < report["cache_bytes_per_text_byte"] < 200 and 0 < report["excluded"] < 0.1


def test_weights_of_a_resumed_run_are_those_of_an_uninterrupted_one(
    job: Job, whole: str, make: Callable[[int], Path], tmp_path: Path
) -> None:
    flags = ("--logits-load-dir", str(make(32)), "--stages", "2a")
    assert train(job, whole, tmp_path / "straight", *flags) == 0
    assert train(job, whole, tmp_path / "parts", *flags, "--exit-interval", "2") == 0
    assert train(job, whole, tmp_path / "parts", *flags) == 0
    straight, parts = weights(tmp_path / "straight", "2a"), weights(tmp_path / "parts", "2a")
    assert all(value.equal(parts[name]) for name, value in straight.items())
