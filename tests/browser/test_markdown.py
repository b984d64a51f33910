"""What models write, as elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.browser.scripted import ScriptedGateway

if TYPE_CHECKING:
    from playwright.sync_api import Page

SHOW = """async text => {
  const { MarkdownView } = await import("/static/markdown.js");
  const root = document.createElement("div");
  new MarkdownView(root).update(text);
  for (const node of root.querySelectorAll(".code-head")) node.remove();
  for (const node of root.querySelectorAll("*"))
    for (const { name } of [...node.attributes])
      if (!["href", "start", "data-align", "checked"].includes(name)) node.removeAttribute(name);
  return root.innerHTML;
}"""

CASES = {
    "a *b* **c** ***d*** ~~e~~ `f*g*`": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong>"
    " <del>e</del> <code>f*g*</code></p>",
    "**a *b* c** and *a **b** c*": "<p><strong>a <em>b</em> c</strong>"
    " and <em>a <strong>b</strong> c</em></p>",
    "snake_case_name, 2 * 3 * 4, ~5": "<p>snake_case_name, 2 * 3 * 4, ~5</p>",
    "`` a`b ``": "<p><code>a`b</code></p>",
    r"\*no\* \[no](x)": "<p>*no* [no](x)</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n## B ##\n####### C": "<h3>A</h3><h4>B</h4><p>####### C</p>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul>"
    "</li><li><p>e</p></li></ul>",
    "3. a\n4. b\n\ntext": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>',
    "1. a\n   ```\n   x\n   ```\n2. b": "<ol><li><p>a</p><figure><pre><code>x</code></pre></figure></li>"
    "<li><p>b</p></li></ol>",
    "text\n- item": "<p>text</p><ul><li><p>item</p></li></ul>",
    "- [x] a\n- [ ] b": '<ul><li><input checked=""><p>a</p></li><li><input><p>b</p></li></ul>',
    "```\na\n\n  b <c>\n```\nd": "<figure><pre><code>a\n\n  b &lt;c&gt;</code></pre></figure><p>d</p>",
    "~~~~\n~~~\n~~~~": "<figure><pre><code>~~~</code></pre></figure>",
    "```py\nopen": "<figure><pre><code>open</code></pre></figure>",
    "| a | b |\n| :-: | -: |\n| `1` | x \\| y |\n| only |": "<div><table><thead><tr>"
    '<th data-align="center">a</th><th data-align="right">b</th></tr></thead><tbody><tr>'
    '<td data-align="center"><code>1</code></td><td data-align="right">x | y</td></tr><tr>'
    '<td data-align="center">only</td><td data-align="right"></td></tr></tbody></table></div>',
    "a | b": "<p>a | b</p>",
    "see https://a.org/b_(c). Or <https://d.org>": '<p>see <a href="https://a.org/b_(c)">https://a.org/b_(c)</a>.'
    ' Or <a href="https://d.org/">https://d.org</a></p>',
    "(https://a.org)": '<p>(<a href="https://a.org/">https://a.org</a>)</p>',
    '[a *b*](https://c.org "t")': '<p><a href="https://c.org/">a <em>b</em></a></p>',
    "[https://a.org](https://b.org)": '<p><a href="https://b.org/">https://a.org</a></p>',
    "[a](javascript:alert) [b](//c.org) [d](/e) [f](data:g)": "<p>[a](javascript:alert) [b](//c.org) [d](/e)"
    " [f](data:g)</p>",
    "<b>x</b> &amp; <!-- y -->": "<p>&lt;b&gt;x&lt;/b&gt; &amp;amp; &lt;!-- y --&gt;</p>",
}


@pytest.fixture(scope="module")
def blank(browser: object, _gateway: ScriptedGateway) -> object:
    """One page for all cases."""
    context = browser.new_context()  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(_gateway.url)
    yield page
    context.close()


@pytest.mark.parametrize("text", CASES)
def test_markdown_becomes_elements(blank: Page, text: str) -> None:
    assert blank.evaluate(SHOW, text) == CASES[text]


@pytest.mark.parametrize(
    "part",
    ["[", "*a", "**a _b ", "`a", "[a](", "[a]( ", "![a](<", "<http://", "https://a.org/......", "> ", "- ",
     "  - ", "| a ", "# # ", "``` a", "\\", "~~", "_", "*", "1. a\n\n", "a |\n-|\n", "`` ` ",
     "<!--", '"""', "/*"],
)  # fmt: skip
def test_no_text_takes_long(blank: Page, part: str) -> None:
    """Time that grows with the square of these lengths would outlast the test's own limit."""
    for before in ("", "```python\n"):
        blank.evaluate(SHOW, before + part * (150_000 // len(part)))


@pytest.mark.parametrize(
    "text",
    [
        "```" + " " * 300_000 + "`",
        "~~~" + " " * 300_000 + "`",
        "`" * 150_000 + " " * 150_000 + "`",
        "|a|\n|-|" + " " * 300_000 + "x",
        "- - -" + " " * 300_000 + "x",
        "# " + " " * 300_000 + "x #",
    ],
    ids=["fence", "tildes", "ticks", "table", "rule", "heading"],
)
def test_no_line_takes_long(blank: Page, text: str) -> None:
    blank.evaluate(SHOW, text)


def test_what_has_not_changed_is_left_alone(blank: Page) -> None:
    kept = blank.evaluate(
        """async () => {
          const { MarkdownView } = await import("/static/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          view.update("one\\n\\n```py\\na");
          const [first, code] = root.children;
          view.update("one\\n\\n```py\\na = 1\\n```\\n\\nmore");
          const text = code.querySelector("code").textContent;
          return [root.children[0] === first, root.children[1] === code, text, root.children.length];
        }"""
    )
    assert kept == [True, True, "a = 1", 3]


def test_code_is_coloured(visit: Callable[..., Page], gateway: ScriptedGateway) -> None:
    page = visit(gateway.url)
    spans = page.evaluate(
        """async () => {
          const { appendCode } = await import("/static/highlight.js");
          const code = document.createElement("code");
          appendCode(code, "def f(x):  # why\\n    return 'a' + 12", "python");
          const spans = [...code.children].map(node => `${node.className} ${node.textContent}`);
          return [code.textContent, ...spans];
        }"""
    )
    assert spans == [
        "def f(x):  # why\n    return 'a' + 12",
        "code-word def",
        "code-comment # why",
        "code-word return",
        "code-string 'a'",
        "code-number 12",
    ]
