"""A page as a reader's program sees it, for tests: parsed strictly, with what matters collected."""

import base64
import hashlib
import html.parser
import json
from typing import Any

VOID = {"meta", "link", "img", "source", "br"}


class HtmlPage(html.parser.HTMLParser):
    """Parse a page, and check that tags nest, nothing is fetched, figures are described, its policy allows itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        """Names of the elements, as they begin."""
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        """Tag and attributes of each element."""
        self.texts: list[str] = []
        """Texts as they are shown, without spaces around."""
        self.classes: dict[str, str] = {}
        """Text -> class of the element in which it stands."""
        self.digests: dict[str, str] = {}
        """Style and script -> how a policy names them."""
        self.data: list[Any] = []
        """What stands in script elements as JSON."""
        self.raw: list[str] = []
        """Texts of style and script, and all others, with their spaces."""
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self._check()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), "an attribute stands twice"
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes.append((tag, values))
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self._open.append((tag, values))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.raw.append(data)
        if not data.strip() or not self._open:
            return
        tag, values = self._open[-1]
        if values.get("type") == "application/json":
            assert not set("<>&") & set(data)  # could end the element, or its script
            self.data.append(json.loads(data))
        elif tag in ("style", "script"):
            self.digests[tag] = "sha256-" + base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
        else:
            self.texts.append(data.strip())
            self.classes[data.strip()] = values.get("class", "")

    def all(self, name: str) -> list[str]:
        """Values of an attribute, of whatever element."""
        return [values[name] for _, values in self.attributes if name in values]

    def _check(self) -> None:
        assert self.tags.count("h1") == self.tags.count("title") == self.tags.count("main") == 1
        ids = self.all("id")
        assert len(set(ids)) == len(ids)
        for address in [*self.all("src"), *self.all("srcset"), *self.all("href")]:
            assert address.startswith("data:") or address.removeprefix("#") in ids, address
        assert all(image["alt"].strip() for image in self.images)
        assert not [
            name for _, values in self.attributes for name in values if name == "style" or name.startswith("on")
        ]
        policy = next(values["content"] for tag, values in self.attributes if "http-equiv" in values)
        assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
        assert all(self.digests[tag] in policy for tag in ("style", "script"))
