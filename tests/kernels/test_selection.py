"""Which path the operators take, and what a user is told about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megabyte_distill.config.training import KernelMode
from megabyte_distill.kernels import build, dispatch, library, ops
from megabyte_distill.kernels.__main__ import main, usage_table
from megabyte_distill.kernels.fused import FUSED_OPS
from megabyte_distill.kernels.library import Library, calls
from megabyte_distill.kernels.selection import choose, gpu_refusal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_in_place() -> Iterator[None]:
    yield
    dispatch.install({})


def runs_fused() -> bool:
    before = calls.total()
    ops.byte_embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(4, 8))
    return calls.total() > before


def test_only_fused_takes_the_kernels_on_a_cpu(cpu_library: Library) -> None:
    for mode, expected in ((KernelMode.AUTO, False), (KernelMode.FUSED, True), (KernelMode.REFERENCE, False)):
        choice = choose(mode, CPU)
        assert choice.fused is runs_fused() is expected
        assert mode.value in str(choice)


def test_fused_without_a_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "library_path", lambda kind: tmp_path / f"{kind}.so")
    with pytest.raises(ValueError, match=r"--kernels fused: there is no kernel library.*kernels build cpu; or use"):
        choose(KernelMode.FUSED, CPU)
    assert not runs_fused()


def test_a_file_that_is_no_library_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(ValueError, match=r"broken\.so cannot be loaded"):
        library.load("cpu", tmp_path / "broken.so")


def test_auto_leaves_to_torch_what_the_kernels_do_not_take(cpu_library: Library) -> None:
    ids, table = torch.zeros(2, dtype=torch.int64), torch.ones(4, 12)
    dispatch.install(FUSED_OPS, device="cpu")
    assert torch.equal(ops.byte_embedding(ids, table), torch.ones(2, 12))
    dispatch.install(FUSED_OPS, device="cpu", strict=True)
    with pytest.raises(ValueError, match="width of 12"):
        ops.byte_embedding(ids, table)


def test_tensors_of_another_device_go_to_torch_or_are_an_error() -> None:
    ids, table = torch.zeros(2, dtype=torch.int64), torch.ones(4, 8)
    dispatch.install(FUSED_OPS, device="cuda")
    assert torch.equal(ops.byte_embedding(ids, table), torch.ones(2, 8))
    dispatch.install(FUSED_OPS, device="cuda", strict=True)
    with pytest.raises(ValueError, match="got tensors on cpu, expected cuda"):
        ops.byte_embedding(ids, table)


@pytest.mark.parametrize(
    "targets, capability, runs",
    [
        (("sm_80", "sm_90a", "sm_100"), (8, 0), True),
        (("sm_80", "sm_90a", "sm_100"), (8, 9), True),  # binaries of a generation run on its later chips
        (("sm_80", "sm_90a", "sm_100"), (9, 0), True),
        (("sm_80", "sm_90a", "sm_100"), (10, 0), True),
        (("sm_80", "sm_90a"), (12, 0), True),  # from the PTX of compute_80
        (("sm_80", "sm_90a", "sm_100"), (7, 5), False),
        (("sm_90a",), (10, 0), False),  # code for 9.0a runs on 9.0 alone
        (("sm_90a",), (8, 0), False),
    ],
)
def test_on_which_gpus_a_library_runs(targets: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    refusal = gpu_refusal(targets, capability)
    assert (refusal is None) is runs
    if refusal is not None:
        assert f"{capability[0]}.{capability[1]}" in refusal and targets[0] in refusal


def test_the_report_names_every_operator_and_its_path(cpu_library: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    report = capsys.readouterr().out
    assert f"cpu library: {cpu_library.path}" in report and "cuda library:" in report
    if not torch.cuda.is_available():
        for name in FUSED_OPS:
            assert f"fused on cpu: {name}: fused: " in report
            assert f"auto on cpu: {name}: torch (" in report


def test_the_table_of_registers_shows_spills() -> None:
    usages = [
        build.KernelUsage(kernel="good", architecture="sm_80", registers=40, spilled_bytes=0),
        build.KernelUsage(kernel="good", architecture="sm_90a", registers=42, spilled_bytes=0),
        build.KernelUsage(kernel="bad", architecture="sm_80", registers=255, spilled_bytes=16),
    ]
    header, bad, good = usage_table(usages).splitlines()
    assert header.split() == ["kernel", "sm_80", "sm_90a", "spilled", "bytes"]
    assert bad.split() == ["bad", "255", "-", "16"]
    assert good.split() == ["good", "40", "42", "0"]
