"""The documents, their fenced blocks and the commands in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")
)
# A comment directly above a block that no test runs.
MARKER = re.compile(r"<!-- not run: \S.* -->")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: where it stands, its language and text, and whether a marker says why nothing runs it."""

    document: str
    line: int
    language: str
    text: str
    marked: bool

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks_of(document: str) -> list[Block]:
    text, blocks = text_of(document), []
    for found in FENCE.finditer(text):
        before = text[: found.start()].splitlines()
        marked = bool(before) and bool(MARKER.fullmatch(before[-1].strip()))
        blocks.append(Block(document, len(before) + 1, found[1], found[2], marked))
    return blocks


def all_blocks(language: str) -> list[Block]:
    """Every block of a language that no marker excuses."""
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    return [block for block in blocks if block.language == language and not block.marked]


def commands_of(block: Block) -> list[str]:
    """Its lines, continued ones joined, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def commands(document: str) -> list[str]:
    """Of its sh blocks, marked ones too."""
    return [command for block in blocks_of(document) if block.language == "sh" for command in commands_of(block)]


def anchors(document: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
