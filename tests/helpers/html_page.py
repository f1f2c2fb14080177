"""A page as a reader and a browser get it: its text, tags and links, and what is wrong with its markup."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}
ONE_A_PAGE = ("html", "head", "title", "body", "main", "h1")
NO_BLOCKS = {"p", "span", "code", "b", "a", "summary", "h1", "h2", "h3", "h4"}  # hold no block
BLOCKS = {"p", "div", "table", "ul", "dl", "figure", "h1", "h2", "h3", "h4", "details"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--allow-file-access-from-files", "--virtual-time-budget=5000", "--window-size=1400,1000"),
)
# Shows the page in a frame of a given width, and writes down what is wider than its place. A table may scroll in `.scroll`.
WRAPPER = """<!doctype html><body>
<iframe id="frame" src="{page}" style="width:{width}px;height:4000px;border:0"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("frame").onload = event => {{
  const page = event.target.contentDocument, found = [], root = page.documentElement;
  page.querySelectorAll("details").forEach(one => one.open = true);
  if (root.scrollWidth > root.clientWidth) found.push("the page: " + root.scrollWidth);
  for (const one of page.querySelectorAll("body *:not(.scroll *)")) {{
    if (one.closest("svg") || one.matches(".scroll, .bar") || getComputedStyle(one).display === "inline") continue;
    if (one.scrollWidth > one.clientWidth + 1)
      found.push(`${{one.tagName}}.${{one.className}}: ${{one.scrollWidth}} ${{one.textContent.slice(0, 60)}}`);
  }}
  for (const text of page.querySelectorAll("svg text")) {{
    const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
    if (inner.left < outer.left - 1 || inner.right > outer.right + 1) found.push("svg text: " + text.textContent);
  }}
  document.getElementById("found").textContent = found.length ? found.join("\\n") : "none";
}};
</script></body>"""


class Page(HTMLParser):
    """Tags, their attributes, the text a reader sees, links, and faults of the markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.links: dict[str, str] = {}  # text -> href
        self.text, self.faults = "", []
        self.loaded: list[str | None] = []  # what a browser would fetch
        self._open: list[str] = []
        self._ids: list[str] = []
        self._link: tuple[str, int] | None = None
        self.feed(text)
        self.faults += [f"<{tag}> is not closed" for tag in self._open]
        self.faults += [f"{self.tags.count(tag)} <{tag}>" for tag in ONE_A_PAGE if self.tags.count(tag) != 1]
        self.faults += [f"id {name} twice" for name in set(self._ids) if self._ids.count(name) > 1]
        inner = [href[1:] for href in self.links.values() if href.startswith("#")]
        self.faults += [f"#{name} is nowhere" for name in inner if name not in self._ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)

    def _start(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names, given = [name for name, _ in attrs], dict(attrs)
        self.tags.append("svg title" if tag == "title" and "svg" in self._open else tag)
        self.attributes += attrs
        if self._open and self._open[-1] in NO_BLOCKS and tag in BLOCKS:
            self.faults.append(f"<{tag}> in <{self._open[-1]}>")
        if len(set(names)) < len(names):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag == "html" and not given.get("lang"):
            self.faults.append("no language")
        if tag == "img" and not given.get("alt"):
            self.faults.append("a picture without alt")
        if tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden")):
            self.faults.append("an SVG without a label")
        if (given.get("id")) is not None:
            self._ids.append(str(given["id"]))
        self.loaded += [value for name, value in attrs if name in ("src", "srcset", "data", "action", "poster")]
        self.loaded += [value for name, value in attrs if tag == "link" and name == "href"]
        if tag == "a":
            self._link = (str(given.get("href")), len(self.text))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.faults.append(f"</{tag}> closes {self._open[-1:]}")
        else:
            self._open.pop()
        if tag == "a" and self._link is not None:
            self.links[self.text[self._link[1] :]] = self._link[0]

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())


def browser() -> str | None:
    """A Chromium, where one is installed."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def too_wide(page: Path, width: int, folder: Path) -> str:
    """What is wider than its place when the page is shown `width` pixels wide, a line each; "none" if nothing is."""
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(WRAPPER.format(page=page.as_uri(), width=width))
    command = [str(browser()), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0] or done.stderr[-500:] or "no answer"
