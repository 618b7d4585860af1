"""A small, safe subset of Markdown: everything is escaped first, then a few patterns become tags."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_CODE = re.compile(r"`([^`]+)`")
_BOLD = re.compile(r"\*\*(\S(?:.*?\S)?)\*\*")
_LINK = re.compile(r"\[([^\]]+)\]\(((?:https?://|mailto:|#)[^\s)]+)\)")


def inline(text: str) -> Markup:
    """`text` with bold, code and links as HTML; nothing else in it is interpreted."""
    parts = _CODE.split(text)
    return Markup("").join(
        Markup(f"<code>{escape(part)}</code>") if index % 2 else _spans(part) for index, part in enumerate(parts)
    )


def blocks(text: str) -> Markup:
    """Paragraphs, parted by empty lines, and lists of lines that start with "- "."""
    pieces: list[Markup] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        prose: list[str] = []
        bullets: list[str] = []
        for line in block.splitlines():
            stripped = line.strip()
            if stripped.startswith("- "):
                bullets.append(stripped[2:])
            elif bullets:
                bullets[-1] += " " + stripped
            else:
                prose.append(stripped)
        if any(prose):
            pieces.append(Markup(f"<p>{inline(' '.join(prose))}</p>"))
        if bullets:
            pieces.append(
                Markup("<ul>{}</ul>").format(Markup("").join(Markup(f"<li>{inline(b)}</li>") for b in bullets))
            )
    return Markup("\n").join(pieces)


def whole_words(text: str) -> Markup:
    """`text` for a heading: short names with hyphens in them (Qwen3-0.6B) are not broken at the end of a line."""
    return Markup(" ").join(
        Markup('<span class="word">{}</span>').format(word) if "-" in word and len(word) <= 20 else escape(word)
        for word in text.split()
    )


def _spans(text: str) -> Markup:
    safe = str(escape(text))
    safe = _LINK.sub(r'<a href="\2">\1</a>', safe)
    return Markup(_BOLD.sub(r"<strong>\1</strong>", safe))
