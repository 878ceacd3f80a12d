"""The pages agree with the code: what they name exists, and no command, setting or route is left out."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main

from deploy.cli import app
from schemas import envfile
from tests import pages
from tests.command import ROOT

README: Final = ROOT / "README.md"
README_LINES_MAX: Final = 180
PAGES: Final = sorted(pages.pages())
WITHOUT_A_COMMAND: Final = {"--", "--help", "--install-completion", "--show-completion"}
"""Options that typer adds."""
LINKED_SUFFIXES: Final = ("py", "md", "toml", "json", "svg", "txt", "yml", "css")

_FENCED: Final = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN: Final = re.compile(r"`([^`]+)`")
_LINK: Final = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)")
_PATH: Final = re.compile(rf"[\w.<>*-]+(?:/[\w.<>*-]+)*(?:/|\.(?:{'|'.join(LINKED_SUFFIXES)}))")
_NAME: Final = re.compile(r"[a-z]+(?:[._][a-z]+)+|[A-Z]+(?:_[A-Z]+)*")
_SETTING: Final = re.compile(r"\b(?:PAYFOLD|STRIPE)_[A-Z_]*[A-Z]\b")
_ROUTE: Final = re.compile(r"(?:(?<=-host)|(?<=:8000)|(?<![\w.]))/(?:v1|health|metrics|webhooks)\b[\w/{}-]*")
_COMMAND: Final = re.compile(r"(?:heroku run )?(?:\S*/)?(?P<by>payfold|deploy/dev|python -m deploy)(?: (?P<rest>.*))?$")
_VERB: Final = re.compile(r"^([a-z]+)\)$", re.MULTILINE)
_FIGURE: Final = re.compile(r"[\d.,]+ (?:/s|ms|MB)")


def ids(page: Path) -> str:
    """Return the name of a page in a test's report."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> Iterator[str]:
    """Yield the blocks of code in *language*."""
    for block in _FENCED.finditer(page.read_text(encoding="utf-8")):
        if block[1] == language:
            yield block[2]


def spans(page: Path) -> list[str]:
    """Return what is in backticks, each on one line."""
    return [" ".join(span.replace("\\|", "|").split()) for span in _SPAN.findall(prose(page))]


@cache
def names_in_the_code() -> frozenset[str]:
    """Return the settings, and each word of the packages, tests and alerts, as well as its parts between dots."""
    sources = (
        path for folder in pages.FOLDERS for kind in ("py", "yml") for path in (ROOT / folder).rglob(f"*.{kind}")
    )
    words = {word for path in sources for word in re.findall(r"[\w.]+", path.read_text(encoding="utf-8"))}
    return frozenset(words | {part for word in words for part in word.split(".")} | set(pages.settings()))


@cache
def verbs() -> frozenset[str]:
    """Return the words of deploy/dev that are no payfold command."""
    return frozenset(_VERB.findall((ROOT / "deploy" / "dev").read_text(encoding="utf-8")))


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words after `payfold` of each line in the page's shell blocks, up to a pipe or a redirection."""
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            if (found := _COMMAND.match(line.strip())) and found["rest"]:
                words = shlex.split(re.split(r" [|>]", found["rest"])[0], comments=True)
                if found["by"] != "deploy/dev" or words[0] not in verbs():
                    yield words


@cache
def whole() -> Any:  # noqa: ANN401 - typer's copy of click has no public types
    """Return the payfold command."""
    return typer.main.get_command(app)


def parsed(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that *words* name, and the words after its name."""
    command, rest = whole(), list(words)
    if rest[0] == "--env-file":
        del rest[:2]
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    return command, rest


def exists(name: str, page: Path) -> bool:
    """Return whether *name* is a file or folder, from the checkout's root or the page's folder; `<x>` is any name."""
    pattern = re.sub(r"<\w+>", "*", name)
    return any(any(folder.glob(pattern)) for folder in (ROOT, page.parent))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short() -> None:
    """A stranger reads it in ten minutes."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES_MAX


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_tables_are_current(page: Path) -> None:
    """Every command, setting and route is there as the code has it; `python -m tests.pages` writes the tables."""
    text = page.read_text(encoding="utf-8")

    assert pages.current(text) == text


def test_each_generated_table_has_a_page() -> None:
    """Commands, settings and routes are each on one page, which the front page links to."""
    marked = [re.findall(r"<!-- (\w+): written by", page.read_text(encoding="utf-8")) for page in PAGES]

    assert sorted(name for names in marked for name in names) == ["commands", "routes", "settings"]
    for page, names in zip(PAGES, marked, strict=True):
        assert not names or f"({ids(page)})" in prose(README)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link names a file, and each anchor a heading in it."""
    for target, anchor in _LINK.findall(prose(page)):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page: Path) -> None:
    """Each path in backticks, or in a command of a shell block on a file of the tests, is in the checkout."""
    named = [span for span in spans(page) if _PATH.fullmatch(span)]
    named += [word for block in blocks(page, "sh") for word in re.findall(r"tests/[\w/.]+", block)]

    assert [name for name in named if not exists(name, page)] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_names_stand_in_the_code(page: Path) -> None:
    """Each log line, cause, anomaly, kind of change and constant in backticks is a name in the code."""
    named = {span for span in spans(page) if _NAME.fullmatch(span) and not exists(span, page)}

    assert named <= names_in_the_code()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_exist(page: Path) -> None:
    """Each name that looks like a setting is one, or names the file of one."""
    named = set(_SETTING.findall(page.read_text(encoding="utf-8"))) - {envfile.ENV_FILE}

    assert {name.removesuffix("_FILE") for name in named} <= set(pages.settings())


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_routes_exist(page: Path) -> None:
    """Each address of ours is a route, by any name of its parameter."""
    known = {re.sub(r"{\w+}", "{}", route.partition(" ")[2]) for route in pages.routes()}
    named = {re.sub(r"{\w+}", "{}", found) for found in _ROUTE.findall(page.read_text(encoding="utf-8"))}

    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_parse(page: Path) -> None:
    """Each command line in a shell block names a command, and its options and their values are accepted."""
    for words in command_lines(page):
        command, rest = parsed(words)
        assert not hasattr(command, "commands") or command.invoke_without_command, words
        command.make_context(" ".join(words), rest)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_in_sentences_exist(page: Path) -> None:
    """Each command in backticks exists with the options that are named with it."""
    for span in spans(page):
        found = _COMMAND.match(span)
        words = [word for word in (found["rest"] or "").split() if word not in {"…", "COMMAND"}] if found else []
        if not words or words[0] in verbs():
            continue
        command, rest = parsed(words)
        known = {name for of in (command, whole()) for names in pages.options(of) for name in names} | WITHOUT_A_COMMAND
        assert not hasattr(command, "commands") or not rest or rest[0].startswith("-"), span
        assert {word for word in rest if word.startswith("--")} <= known, span


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_in_sentences_exist(page: Path) -> None:
    """Each option that stands in backticks by itself is one of some command."""
    named = {name for span in spans(page) if span.startswith("--") for name in re.findall(r"--[a-z-]*", span)}
    commands = (whole(), *pages.commands().values())

    assert named <= {name for of in commands for names in pages.options(of) for name in names} | WITHOUT_A_COMMAND


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_modules_exist(page: Path) -> None:
    """Each module that a page runs with Python can be found, without running it."""
    text = page.read_text(encoding="utf-8")

    for name in re.findall(r"python -m ((?:api|deploy|schemas|tests|worker)[\w.]*)", text):
        assert find_spec(name), name


def test_the_tree_is_whole() -> None:
    """Each package, and each folder of a package with code, stands in the tree for contributors."""
    (tree,) = blocks(ROOT / ".github" / "CONTRIBUTING.md", "text")
    shown = re.findall(r"^ *([a-z_]+)/ ", tree, re.MULTILINE)
    packages = [path.parent for top in pages.FOLDERS for path in (ROOT / top).glob("**/__init__.py")]

    assert {folder.name for folder in packages if len(folder.relative_to(ROOT).parts) <= 2} <= set(shown)


def test_the_demo_prints_these_lines() -> None:
    """Each label in the front page's excerpt of the demo is one that the demo prints."""
    (excerpt,) = [block for block in blocks(README, "text") if "posts sent" in block]
    labels = [re.split(r" {2,}", line)[0] for line in excerpt.splitlines()]
    printed = (ROOT / "deploy" / "demo.py").read_text(encoding="utf-8")

    assert len(labels) == 10
    assert [label for label in labels if label not in printed] == []


def test_the_figures_are_those_of_the_bench() -> None:
    """The front page's figures are on the page of the measurements, too."""
    measured = (ROOT / "deploy" / "bench" / "README.md").read_text(encoding="utf-8")
    shown = _FIGURE.findall(prose(README).partition("## Four figures")[2].partition("\n## ")[0])

    assert len(shown) == 8
    assert [figure for figure in shown if figure not in measured] == []
