"""A page of HTML as its elements and texts."""

from __future__ import annotations

from html.parser import HTMLParser

_LOADING = ("script", "link", "img", "iframe", "object", "embed")
_FOREIGN = {"src", "href", "action", "onclick", "onload"}


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its texts; every element must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    @property
    def loads_nothing(self) -> bool:
        """Whether all of the page is in its file: links lead to places in it, and no script runs."""
        for tag, attributes in self.elements:
            found = _FOREIGN & set(attributes)
            if tag in _LOADING or (found and not (tag == "a" and (attributes.get("href") or "").startswith("#"))):
                return False
        return True

    def styles(self, name: str) -> list[str]:
        """The style of every element of a class."""
        return [attrs["style"] or "" for _, attrs in self.elements if (attrs.get("class") or "") == name]
