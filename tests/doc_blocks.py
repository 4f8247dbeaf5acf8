"""Code blocks, inline code, links and headings of the Markdown, found by a CommonMark parser.

`Block.kind` says what a block is.  A fence names it; an indented block is commands, unless every
line begins with a path of the repository (a listing) or the first is the header of a table.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
SAMPLES = ("text", "json", "html")  # what something prints, or a formula: not checked
SHELL = ("sh", "bash", "console")


@dataclass(frozen=True)
class Block:
    page: str
    """Relative to the repository."""
    line: int
    language: str
    """Of the fence; empty for an indented block."""
    text: str

    def __str__(self) -> str:  # the id of its test
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str:
        if self.language in SHELL:
            return "shell"
        if self.language or not self.text.strip():
            return self.language
        lines = self.text.splitlines()
        if lines[0].startswith("image,"):
            return "csv"
        if all((ROOT / line.split()[0]).exists() and "  " in line for line in lines):
            return "listing"
        return "shell"


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")))


def inline(page: Path) -> Iterator[tuple[int, Token]]:
    """The line and the token of every piece of inline Markdown."""
    for token in tokens(page):
        for child in token.children or ():
            yield (token.map or [0])[0] + 1, child


def blocks() -> list[Block]:
    """Fences, and indented blocks as far as the next empty line each."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for token in tokens(page):
            line = (token.map or [0])[0] + 1
            if token.type == "fence":
                found.append(Block(name, line, token.info.strip(), token.content))
            elif token.type == "code_block":
                for part in re.finditer(r"(?:.*\S.*\n?)+", token.content):
                    before = token.content[: part.start()].count("\n")
                    found.append(Block(name, line + before, "", part[0]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block, without comments."""
    text = block.text
    if block.language == "console":  # commands among what they print
        text = "\n".join(re.findall(r"^\$ (.*(?:\\\n.*)*)", text, re.MULTILINE))
    return split_commands(text)


def split_commands(text: str) -> list[list[str]]:
    """``a --b \\\n c && d`` → ``[["a", "--b", "c"], ["d"]]``; assignments in front are left out."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("&|;"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0], re.DOTALL):
                words = words[1:]
            if words:
                found.append(words)
            words = []
    return found


def links(page: Path) -> Iterator[tuple[int, str]]:
    """The line and target of every link and picture that leads to a file or a heading of ours."""
    for line, token in inline(page):
        target = str(token.attrGet("href" if token.type == "link_open" else "src") or "")
        if token.type in ("link_open", "image") and not re.match(r"[a-z]+:", target):
            yield line, target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for token, content in pairwise(tokens(page)):
        if token.type == "heading_open":
            text = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            number = found[slug] = found.get(slug, -1) + 1
            if number:
                found[f"{slug}-{number}"] = 0
    return set(found)
