"""SVG files made fit to stand inside an HTML page, several to a page.

Three things go wrong when SVG files are pasted into HTML: their ids clash (every matplotlib file has a `figure_1` and
clip paths, and a browser takes the first on the page, which may be hidden), their style sheets leak onto the page,
and their namespaces and document types mean nothing there. So the file is parsed, checked, its ids get a prefix, and
it is written out as plain elements.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from markupsafe import Markup

_FORBIDDEN = {"script", "style", "foreignObject", "iframe"}
_REFERENCE = re.compile(r"url\(\s*(['\"]?)([^)'\"]*)\1\s*\)")


def inline_svg(svg: str, *, prefix: str, label: str) -> Markup:
    """`svg` as one `<svg role="img">` element for HTML.

    Args:
        svg: Text of an SVG file or element, with a `viewBox`.
        prefix: Put before every id, and before every reference to one.
        label: The picture in words.

    Raises:
        ValueError: Not well-formed, no `viewBox`, or it holds a script, a style sheet, an event handler or an outside
            reference.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"the SVG is not well-formed XML ({error})") from error
    if _local(root.tag) != "svg":
        raise ValueError(f"expected an <svg> element, got <{_local(root.tag)}>")
    if "viewBox" not in root.attrib:
        raise ValueError("the SVG has no viewBox, so it cannot scale with the page: add one")
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in _FORBIDDEN:
            raise ValueError(f"the SVG holds a <{element.tag}>, which would act on the whole page: remove it")
        element.attrib = {
            _local(name): _attribute(_local(name), value, prefix) for name, value in element.attrib.items()
        }
        element.tail = None if not (element.tail or "").strip() else element.tail
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attribute(name: str, value: str, prefix: str) -> str:
    if name.lower().startswith("on"):
        raise ValueError(f"the SVG has an event handler ({name}): remove it")
    if name == "id":
        return prefix + value
    if name == "href":
        if value.startswith("#"):
            return "#" + prefix + value[1:]
        if not value.startswith("data:image/"):
            raise ValueError(f"the SVG refers to {value!r} outside the page: inline it")
    return _REFERENCE.sub(lambda match: _local_url(match.group(2), prefix), value)


def _local_url(target: str, prefix: str) -> str:
    if not target.startswith("#"):
        raise ValueError(f"the SVG refers to {target!r} outside the page: inline it")
    return f"url(#{prefix}{target[1:]})"


def _local(name: str) -> str:
    return name.rpartition("}")[2]
