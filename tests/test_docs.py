# SPDX-License-Identifier: Apache-2.0
"""The README and the pages of docs/: short, true to the code, and each link, command and setting in them exists."""

import ast
import doctest
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from sglang_fl.cli import make_parser
from sglang_fl.config.options import OPTIONS, VARIABLES
from sglang_fl.device import probe
from sglang_fl.dispatch import OpImpl, Refusal, SelectionPolicy, reset_global_policy
from sglang_fl.dispatch.catalog import CUSTOM_FORWARD
from sglang_fl.dispatch.ops import OPERATORS
from sglang_fl.vendor_platform import VendorPlatform

CHECKOUT = Path(__file__).parents[1]
READMES = [CHECKOUT / "README.md", CHECKOUT / "README_zh.md"]
PAGES = [*READMES, *sorted((CHECKOUT / "docs").glob("*.md")), CHECKOUT / "benchmarks/README.md", CHECKOUT / "examples/README.md"]
ENGLISH = [page for page in PAGES if not page.stem.endswith("_zh") and page.parent.name != "benchmarks"]
TWINS = [page for page in PAGES if page.with_stem(f"{page.stem}_zh").exists()]
MAX_README, MAX_WORDS = 8192, 30

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
#: A comment that says where the block or table after it comes from.
_SOURCE = re.compile(
    r"^<!-- (output of|figures of|ranges of|transcript of|held by): ([^\n]+) -->\n(.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL
)
_LINK = re.compile(r"\]\(([^()\s]+(?:\([^()]*\))?[^()\s]*)\)")
_VARIABLE = re.compile(r"\b(?:SGLANG_FL|SGLANG_FLAGGEMS)_[A-Z_]+\b")


def name_of(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    return [match[3] for match in _FENCE.finditer(text_of(page))]


def prose(page: Path) -> list[str]:
    """A page's sentences: without code, tables, comments and headings."""
    text = re.sub(r"<!--.*?-->", "", _FENCE.sub("", text_of(page)), flags=re.DOTALL)
    blocks: list[str] = [""]
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "|", "![")):
            blocks.append("")
        elif re.match(r" *([-*]|\d+\.) ", line):
            blocks.append(re.sub(r"^ *([-*]|\d+\.) ", "", line))
        else:
            blocks[-1] += " " + line.strip()
    plain = (re.sub(r"`[^`]*`", "code", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", block)) for block in blocks)
    return [sentence for block in plain for sentence in re.split(r"(?<=[.?!])[\"')*]*\s+", block) if sentence.strip()]


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_readmes_are_short(page: Path) -> None:
    assert len(page.read_bytes()) <= MAX_README


@pytest.mark.parametrize("page", ENGLISH, ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    long = {sentence: words for sentence in prose(page) if (words := len(re.findall(r"[\w'’-]*\w", sentence))) > MAX_WORDS}
    assert not long, "\n".join(f"{words} words: {sentence}" for sentence, words in long.items())


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", text_of(page))):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def command_lines(page: Path) -> list[str]:
    """Every ``sglang-fl …``, in blocks and inline."""
    text = text_of(page)
    inline = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
    lines = [line.strip() for block in code_of(page) for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.removeprefix("again:").strip() for line in lines]
    return [line for line in (*inline, *lines) if re.match(r"((export )?[A-Z_]+=\S+ )*sglang-fl [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page: Path) -> None:
    wrong = []
    for line in command_lines(page):
        words = shlex.split(re.split(r" [>|] ", line)[0], comments=True)
        arguments = words[words.index("sglang-fl") + 1 :]
        error = io.StringIO()
        with redirect_stderr(error):
            try:
                make_parser().parse_args(arguments)
            except SystemExit:
                wrong.append(f"{line}: {error.getvalue()}")
    assert not wrong, "\n".join(wrong)


def test_commands_are_found() -> None:
    found = {line for page in PAGES for line in command_lines(page)}
    assert {"sglang-fl doctor --deep", "sglang-fl ops --diff A B"} <= found and len(found) > 20


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page: Path) -> None:
    assert set(_VARIABLE.findall(text_of(page))) <= VARIABLES


@pytest.mark.parametrize("page", [CHECKOUT / "docs/settings.md", CHECKOUT / "docs/settings_zh.md"], ids=name_of)
def test_every_setting_has_a_row(page: Path) -> None:
    rows = {}
    for line in text_of(page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"`[A-Za-z_]+`", cells[0]):
            rows[cells[0].strip("`")] = cells
    for name, option in OPTIONS.items():
        row = rows.pop(option.env or name, None)
        assert row is not None, f"no row for {option.env or name}"
        if option.users_key:
            assert row[2] == f"`{option.users_key}`"
            continue
        assert row[1] == (f"`{option.yaml}`" if option.yaml else "")
        if option.default not in (None, ()) and name != "flagos_scope":
            default = f"{option.default:g}" if isinstance(option.default, float) else option.default
            assert row[2] == f"`{int(default) if isinstance(default, bool) else default}`", option.env
    assert rows.keys() <= VARIABLES | {"GEMS_VENDOR", *rows.keys() & {"flagos", "triton", "reference", "sglang"}}


def shape(page: Path) -> list[str]:
    """What is the same in both languages: levels of headings, code without comments, rows of tables, links."""
    found = []
    text = text_of(page)
    for block in code_of(page):
        found += ["code", *(re.sub(r"(^|\s)#\s.*", "", line).rstrip() for line in block.splitlines())]
    text = _FENCE.sub("", text)
    found += ["headings", *(match[1] for match in re.finditer(r"^(#+) ", text, re.MULTILINE))]
    found += ["first cells", *(" ".join(re.findall("`.*?`", cell)) for cell in re.findall(r"^\|([^|]*)\|", text, re.MULTILINE))]
    found += ["rows", str(len(re.findall(r"^\|", text, re.MULTILINE)))]
    found += ["sources", *(f"{kind} {what}" for kind, what, _ in _SOURCE.findall(text_of(page)))]
    return found


@pytest.mark.parametrize("page", TWINS, ids=name_of)
def test_twins_have_the_same_shape(page: Path) -> None:
    assert shape(page) == shape(page.with_stem(f"{page.stem}_zh"))


def test_blocks_with_a_source_are_found() -> None:
    assert all(map(sources, ("output", "figures", "ranges"))), "an empty list of cases would be skipped"


def test_there_are_twins() -> None:
    assert {page.stem for page in TWINS} >= {"README", "settings", "vendors"}


@pytest.mark.parametrize("page", ENGLISH, ids=name_of)
def test_python_runs(page: Path) -> None:
    """Each block that stands alone."""
    try:
        for block in re.findall(r"^```python\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL):
            if not block.startswith(" "):
                exec(compile(block, name_of(page), "exec"), {})
    finally:
        reset_global_policy()


@pytest.mark.parametrize("public", [OpImpl, Refusal, SelectionPolicy, VendorPlatform], ids=lambda public: public.__name__)
def test_examples_of_docstrings(public: type) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(public, public.__name__)
    test.globs = vars(sys.modules[public.__module__]).copy()
    report = io.StringIO()
    results = doctest.DocTestRunner().run(test, out=report.write)
    assert results.attempted and not results.failed, report.getvalue()


def test_every_room_is_listed() -> None:
    section = text_of(CHECKOUT / "docs/how-it-works.md").partition("## Which room holds what")[2]
    cells = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    listed = {room for cell in cells for room in re.findall(r"`(\w+)/`", cell)}
    assert listed == {folder.parent.name for folder in (CHECKOUT / "sglang_fl").glob("*/__init__.py")}


def test_classes_that_stay_are_listed() -> None:
    text = text_of(CHECKOUT / "docs/support.md")
    paragraph = text.partition("always stay with SGLang: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", paragraph)) == CUSTOM_FORWARD


def test_every_operator_has_a_row() -> None:
    section = text_of(CHECKOUT / "docs/support.md").partition("## Operators")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(OPERATORS)


#: Private names that are not SGLang's: Python's, PyTorch's, FlagGems's and our own attributes on others' objects.
_NOT_SGLANGS = {
    *("_buffers", "_create_work_from_future", "_cuda_getCurrentRawStream", "_destroy"),
    *("_dispatch_get_all_op_names", "_dispatch_has_kernel", "_dispatch_has_kernel_for_dispatch_key", "_dispatch_key_for_device"),
    *(
        "_ensure_backend_registered",
        "_exit",
        "_fields",
        "_get_schema",
        "_inductor",
        "_is_owned",
        "_plugins",
        "_pytree",
        "_replace",
        "_stream",
    ),
    "_initializing",  # of a module that is being imported: Python's
    *("_can_decompose", "_op_dk", "_ops", "_schema", "_should_allow_numbers_as_tensors"),
    *("_accuses", "_hash", "_is_available", "_is_sglang_fl", "_sglang_fl_cos_sin", "_sglang_fl_joined", "_sglang_fl_obj", "_weight_bias"),
}


def private_names() -> tuple[set[str], set[str]]:
    """Names with an underscore that sglang_fl uses, and those of them that it defines."""
    used: set[str] = set()
    defined: set[str] = set()
    for file in (CHECKOUT / "sglang_fl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.ImportFrom(names=aliases, level=0):
                    used |= {alias.name for alias in aliases}
                case ast.Constant(value=str(text)) if re.fullmatch(r"[\w.:]+", text):
                    used |= set(re.split(r"[.:]", text))
    return {name for name in used if re.fullmatch(r"_[a-z]\w*", name)}, defined


def test_private_names_of_sglang_are_listed() -> None:
    section = text_of(CHECKOUT / "docs/how-it-works.md").partition("## Private names of SGLang")[2].partition("## ")[0]
    listed = {name for row in re.findall(r"^\|([^|]*)\|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    used, defined = private_names()
    assert listed <= used, "no longer used"
    assert used - defined - _NOT_SGLANGS <= listed, "list them, with what would replace them"


#: What a line of commands begins with; others are output, and say which test holds it.
_PROGRAMS = "sglang-fl|make|uv|pip|python|bash|git|export|mkdir|for|do"
_COMMAND = re.compile(rf"([A-Za-z_]+=\S* *)*(({_PROGRAMS}) .*|[-#].*|SGLANG_FL_.*|[A-Za-z]+=.*|done|)$")


def is_output(block: str) -> bool:
    lines = block.replace("\\\n", " ").splitlines()
    return block.startswith("$ ") or not all(_COMMAND.match(line.strip()) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_output_says_which_test_holds_it(page: Path) -> None:
    text = _filled(text_of(page))
    held = {block.strip() for _, _, block in _SOURCE.findall(text)}
    outputs = [match[0] for match in _FENCE.finditer(text) if match[2] != "python" and is_output(match[3])]
    assert [block for block in outputs if block.strip() not in held] == []
    named = [what for kind, what, _ in _SOURCE.findall(text) if kind == "held by"]
    assert all((CHECKOUT / file).exists() for file in named)


def sources(kind: str) -> list[tuple[Path, str, str]]:
    return [
        (page, what, block) for page in PAGES for found, what, block in _SOURCE.findall(_filled(text_of(page))) if found == f"{kind} of"
    ]


def _filled(text: str) -> str:
    """Code without empty lines, so that a block ends at the first one."""
    return _FENCE.sub(lambda match: re.sub(r"\n\s*\n", "\n", match[0]), text)


@pytest.mark.parametrize(
    ("page", "command", "block"), sources("output"), ids=lambda value: name_of(value) if isinstance(value, Path) else ""
)
def test_outputs_are_what_the_commands_print(page: Path, command: str, block: str, tmp_path: Path) -> None:
    """Line by line, but for times; … stands for lines that are left out."""
    if probe().vendor != "cpu":
        pytest.skip("the outputs are of a plain CPU")
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES | {"GEMS_VENDOR"}}
    environ = {**clean, "COLUMNS": "100", "XDG_DATA_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    words = shlex.split(command)
    environ |= dict(word.split("=", 1) for word in itertools.takewhile(lambda word: word != "sglang-fl", words))
    arguments = words[words.index("sglang-fl") + 1 :]
    done = subprocess.run([sys.executable, "-m", "sglang_fl", *arguments], env=environ, capture_output=True, text=True)
    printed, shown = without_seconds(done.stdout), without_seconds(block)[1:-1]
    at = 0
    for line in shown:
        if line != "…":
            assert line in printed[at:], f"{name_of(page)}: {command} does not print {line!r}"
            at = printed.index(line, at) + 1
    assert len(shown) > 3


def without_seconds(text: str) -> list[str]:
    return [re.sub(r" *\b\d+ s\b", " N s", line).rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("page", "command", "block"), sources("figures"), ids=lambda value: name_of(value) if isinstance(value, Path) else ""
)
def test_figures_are_what_the_data_give(page: Path, command: str, block: str) -> None:
    script, *arguments = shlex.split(command)
    run = [sys.executable, CHECKOUT / script, *arguments]
    done = subprocess.run(run, cwd=CHECKOUT, env={**os.environ, "COLUMNS": "250"}, capture_output=True, text=True, check=True)
    figures = re.findall(r"\d[\d,.]* tok/s|\d[\d.]* ms/step|\d\.\d+ \[[^]]*\]", block)
    assert len(figures) > 8
    assert [figure for figure in figures if figure not in done.stdout] == []


@pytest.mark.parametrize("page", READMES, ids=name_of)
def test_the_speed_in_the_readme_is_that_of_the_page_about_performance(page: Path) -> None:
    """Which the test above compares with the data."""
    shown = re.findall(r"\d\.\d+ \[[^]]*\]", text_of(page))
    assert len(shown) > 8 and set(shown) <= set(re.findall(r"\d\.\d+ \[[^]]*\]", text_of(CHECKOUT / "docs/performance.md")))


@pytest.mark.parametrize(("page", "files", "table"), sources("ranges"), ids=lambda value: name_of(value) if isinstance(value, Path) else "")
def test_ranges_are_those_of_the_data(page: Path, files: str, table: str) -> None:
    """``1.15 to 1.97`` is the best and the worst median of an operator's implementation, in one variant, of a sitting.

    Of all shapes or of those from 64 tokens on; or of its shares of a copy's speed at the most tokens.
    """
    figures: dict[tuple[str, ...], list[float]] = {}
    for file in files.split():
        for row in json.loads((CHECKOUT / file).read_text())["rows"]:
            key = (row["op"], row["kind"], row.get("variant", ""), file)
            if row.get("ratio"):
                for which in ("all", "from 64 tokens on")[: 1 + (row["tokens"] >= 64)]:
                    figures.setdefault((*key, which), []).append(row["ratio"][0])
            if row.get("bandwidth_share") and row["tokens"] == 8192:
                figures.setdefault((*key, "of a copy"), []).append(row["bandwidth_share"])
    known = {(op, low, high) for (op, *_), found in figures.items() for low in as_printed(min(found)) for high in as_printed(max(found))}
    rows = [(re.findall(r"`(\w+)`", line), re.findall(r"(\d[\d.]*) to (\d[\d.]*)", line)) for line in table.splitlines()]
    shown = [(ops[0], *pair) for ops, pairs in rows for pair in pairs]
    assert len(shown) >= 4 and [figure for figure in shown if figure not in known] == []


def as_printed(number: float) -> set[str]:
    return {f"{number:.1f}", f"{number:.2f}"}
