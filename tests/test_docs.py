"""README and docs say what is so: every command is read by its program, every path, link and flag is there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from megabyte_distill.config.layers import all_options
from megabyte_distill.config.megatron_flags import find_megatron_flag
from tests.doc_commands import ROOT, Call, blocks, calls_of, check_call

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "examples/tiny/README.md",
    *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
OF_OTHER_PROGRAMS = {"--batch_size", "--dependency", "--flag", "--index-url", "--ipc", "--model", "--no-deps"}
"""Flags that the pages name and that are the harness's, Slurm's, pip's or Docker's, or stand for any."""
OF_OTHER_PROJECTS = {"hnet/modules/dc.py", "launch_stage1_7b.sh"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """What stands in backticks in a page's prose."""
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page).replace("\\|", "|"))


@pytest.fixture(scope="module")
def of_readme(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """What README's commands write, which other pages read."""
    made: set[str] = set()
    for call in calls_of("README.md", blocks(ROOT / "README.md"), tmp_path_factory.mktemp("readme")):
        check_call(call, made)
    return frozenset(made)


def check_commands(page: str, commands: list[tuple[int, str]], folder: Path, made: frozenset[str]) -> list[Call]:
    """The calls that a page's commands make; AssertionError where one is wrong."""
    calls, so_far = calls_of(page, commands, folder), set(made)
    for call in calls:
        check_call(call, so_far)
    return calls


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made = frozenset() if page == "README.md" else request.getfixturevalue("of_readme")
    commands = blocks(ROOT / page)
    calls = check_commands(page, commands, tmp_path, made)
    silent = {f"{page}:{line}" for line, text in commands if not is_shell_alone(text)} - {call.place for call in calls}
    assert not silent, f"nothing is called by {silent}"


def is_shell_alone(text: str) -> bool:
    return all(line.startswith(("export ", "source ", "#")) for line in text.strip().splitlines())


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python tools/generate.py --load RUN --prompt x --frob 3", "frob"),
        ("python tools/generate.py --prompt x", "--load"),
        ("python tools/generate.py --load RUN --prompt x --top-k 2.5", "2.5"),
        ("python tools/nothing.py", "not in the repository"),
        ("python -m megabyte_distill.memory --preset olmo2-1b --stage 9z", "unknown stage"),
        ("python -m megabyte_distill.kernels build gpu", "invalid choice"),
        ("python -m pytest tests/nothing.py", "not in the repository"),
        ("python benchmarks/generation.py --nothing", "nothing"),
        ("torchrun examples/pretrain_byte_kd.sh --save RUN --2z.lr 1", "2z"),
        (
            "torchrun --nproc-per-node 3 examples/pretrain_byte_kd.sh … --tensor-model-parallel-size 2",
            "a multiple of 2 ranks",
        ),
        ("torchrun --ranks 3 examples/pretrain_byte_kd.sh", "torchrun"),
        ("torchrun examples/pretrain_byte_kd.sh --data-path data/other_text_document", "no command before makes"),
        ("bash examples/llama3.2_3b.sh --frob", "frob"),
        ("NUM_NODES=2 bash examples/multi_node.sh examples/olmo2_1b.sh", "bash cannot run"),
        ("sbatch --nodes=4 examples/slurm/pretrain.sbatch --stages 9z", "9z"),
        ("make everything", "everything"),
        ("make test WORDS=3", "WORDS"),
        ("pip install '.[everything]'", "everything"),
        ("git clone x", "bash cannot run"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as wrong:
        check_commands("docs/some.md", [(1, command)], tmp_path, frozenset())
    assert problem in str(wrong.value)


def test_commands_are_found_in_fences_and_in_lines(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```bash\nmake demo \\\n    FRESH=1\n```\n```\nmake nothing\n```\nthen `make test` and `make`\n")
    assert blocks(page) == [(2, "make demo \\\n    FRESH=1\n"), (9, "make test")]
    (tmp_path / "run").mkdir()
    calls = calls_of("page.md", blocks(page), tmp_path / "run")
    assert [(call.place, call.words) for call in calls] == [
        ("page.md:2", ("make", "demo", "FRESH=1")),
        ("page.md:9", ("make", "test")),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_an_indented_block(page: str) -> None:
    hidden = re.findall(r"^(?: {4}|\t)(?:python|torchrun|bash|make|pip) .*$", prose(page), re.MULTILINE)
    assert not hidden, f"fence them with ```bash: {hidden}"


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles_and_imports_what_it_imports(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block.replace("…", "..."))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


def anchors(path: Path) -> set[str]:
    """GitHub's names of a page's headings, and names that the page gives to places itself."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    given = set(re.findall(r'<a id="([^"]+)">', text))
    return given | {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_dead_link_and_nothing_to_fill_in(page: str) -> None:
    text, folder = text_of(page), (ROOT / page).parent
    assert "PLACEHOLDER" not in text and "TODO" not in text
    dead = []
    for link in re.findall(r"(?:\]\(|(?:src|href)=\")([^)\"]+)[)\"]", prose(page)):
        name, _, anchor = link.partition("#")
        target = folder / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, dead


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    """Whole paths from the top, the package or its tests; of a bare name some file must have it."""
    names = {path.name for top in ROOT.iterdir() if not top.name.startswith(".") for path in (top, *top.rglob("*"))}
    missing = []
    for span in spans(page):
        if not re.fullmatch(r"\w[\w.-]*(?:/[\w.-]+)*/?", span) or "NAME" in span or span in OF_OTHER_PROJECTS:
            continue
        is_path = re.match(r"(?:tests|benchmarks|docs|tools|scripts|examples|megabyte_distill)/", span)
        is_file = re.search(r"\.(?:py|md|sh|sbatch|cu|h|cpp|toml)$", span)
        if is_path or (is_file and "/" in span):
            places = (ROOT / span, ROOT / "megabyte_distill" / span, ROOT / "tests" / span)
            missing += [] if any(place.exists() for place in places) else [span]
        elif is_file and span not in names:
            missing.append(span)
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_is_one(page: str) -> None:
    sources = [
        path for top in ("megabyte_distill", "tools", "benchmarks", "scripts") for path in ROOT.glob(f"{top}/**/*.py")
    ]
    known = {flag for path in sources for flag in re.findall(r"\"(--[\w-]+)\"", path.read_text(encoding="utf-8"))}
    known |= {f"--{option.flag}" for option in all_options().values()} | OF_OTHER_PROGRAMS
    unknown = []
    for flag in re.findall(r"(?<![\w-])--(?:\d[a-z]\.)?([a-z][\w-]*)", " ".join(spans(page))):
        name = flag.removeprefix("no-")
        if not {f"--{flag}", f"--{name}"} & known and find_megatron_flag(flag) is None:
            unknown.append(f"--{flag}")
    assert not unknown, unknown


def test_each_row_of_what_is_supported_names_what_shows_it() -> None:
    table = text_of("README.md").split("## What is supported")[1].split("What is **not**")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for _, what, shown_by in rows:
        paths = re.findall(r"`([^`]+)`", shown_by)
        assert len(what) < 140, f"one line: {what}"
        assert any(path.startswith(("tests", "benchmarks", "scripts")) for path in paths), what


def test_the_index_has_every_page_once() -> None:
    links = Counter(link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text_of("docs/README.md")))
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {name for name in links if "/" not in name} == pages
    assert set(links.values()) == {1}
