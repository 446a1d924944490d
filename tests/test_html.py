"""Reports in notebooks: what they say without a style, and how they look in a real browser."""

from __future__ import annotations

import html
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from support import PATHS, Mlp, Model, Norm, mapped, members_kernel
from torch import nn

from module_fusion import FusionReport, fuse_modules, report
from module_fusion.rendering.drawing import chain_drawing
from module_fusion.rendering.html import Markup, page_fragment, table
from module_fusion.report import Feed, GroupReport

SCRIPT = Path(__file__).parent.parent / "scripts" / "screenshots.py"
TEXT = "<script>alert('&')</script>"
TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"
STRAIGHT = (Feed(None, 0, "x"), Feed(0, 1, "x"))


class Table(HTMLParser):
    """Reads a table back as viewers without styles and drawings show it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "br":
            self.rows[-1][-1] += "\n"
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1]] = data
        if "svg" not in self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data


def group(roles: str = "norm mlp", **fields: Any) -> GroupReport:
    names = tuple(roles.split())
    given = {
        "action": "fused",
        "paths": tuple(f"layers.0.{name}" for name in names),
        "roles": names,
        "classes": tuple(f"Qwen3{name.upper()}" for name in names),
        "wires": STRAIGHT,
    }
    return GroupReport(**{**given, **fields})


# Chains of every kind: straight, one member, inputs from outside, long wires, several wires between
# the same two, long names, and many inputs that may be left out.
CHAINS = [
    group(kernel="RMSNormMLP", path="kernel", kernel_calls=672),
    group(kernel="RMSNormMLP", path="kernel", kernel_calls=3, member_calls=1, reason="a hook"),
    group(kernel="RMSNormMLP", member_calls=3, reason="mlp has a hook"),
    group(action="would fuse", kernel="RMSNormMLP", path="kernel"),
    group(action="unfused", kernel="RMSNormMLP"),
    group("proj", kernel="AKernelWithALongNameForOneSmallMember", wires=(Feed(None, 0, "input"),)),
    group("a", wires=()),
    group("query key", wires=(*STRAIGHT, Feed(None, 1, "input_tensor"), Feed(None, 0, "a_mask"))),
    group(
        "a b c d",
        kernel="Wired",
        wires=(
            Feed(None, 0, "x"),
            *(Feed(None, 0, f"mask{i}", optional=True) for i in range(4)),
            Feed(0, 1, "p"),
            Feed(0, 1, "queries"),
            Feed(None, 1, "z"),
            Feed(1, 2, "t"),
            Feed(0, 2, "q"),
            Feed(None, 2, "w"),
            Feed(None, 2, "scale", optional=True),
            Feed(2, 3, "u"),
            Feed(1, 3, "t"),
            Feed(0, 3, "p"),
        ),
    ),
    group(
        "norm mlp",
        wires=(
            *STRAIGHT,
            *(Feed(None, i, f"{name}_of_the_input") for i in (0, 1) for name in ("one", "two")),
        ),
    ),
    group(" ".join("abcdefghij"), wires=(STRAIGHT[0], *(Feed(i, i + 1, "x") for i in range(9)))),
    group(
        "post_attention_layernorm_with_a_long_name block_sparse_mixture_of_experts",
        reason="the kernel refuses these members, " * 6,
        paths=("model.language_model.layers.12.first_of_them", "model.other_tower.blocks.1.second"),
    ),
    GroupReport("skipped", reason="'layers.1.norm' has no partner for '**.mlp'"),
]
LONG = GroupReport("skipped", ("a",), ("a",), ("A",), reason="an.identifier." * 12)


def fused_model() -> Model:
    model = Model(3)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, dict(zip(["norm", "mlp"], PATHS, strict=True)), kernel="Fast")
    return model


def test_without_style_and_drawing_it_is_a_table_with_the_words_of_the_text() -> None:
    read = Table(report(fused_model())._repr_html_())
    assert read.texts["p"] == "3 fused"
    assert read.rows == [
        ["", "modules", "kernel", "calls", "note"],
        ["fused x3", f"layers.[0-2]:\nnorm {ARROW} mlp\nNorm {ARROW} Mlp", "Fast", "kernel 0", ""],
        ["", ""],
    ]


def test_an_empty_report_is_a_sentence() -> None:
    read = Table(FusionReport()._repr_html_())
    assert read.texts["p"] == "Nothing is fused"
    assert read.rows == []


def test_there_is_no_script_and_nothing_from_elsewhere() -> None:
    markup = FusionReport(CHAINS)._repr_html_()
    read = Table(markup)
    assert read.tags <= {
        "div", "style", "p", "table", "thead", "tbody", "tr", "th", "td", "span", "code", "br",
        "svg", "title", "desc", "rect", "path", "text",
    }  # fmt: skip
    assert not re.search(r"https?:|url\(|@import|@font-face|\son\w+=|\sid=", markup)


def test_every_rule_of_the_style_is_about_reports_alone() -> None:
    style = Table(page_fragment("title", []))
    rules = re.sub(r"\{[^}]*\}", "\n", style.texts["style"]).replace(",\n", ", ")
    parts = re.split(r",(?![^(]*\))|\n", rules)
    selectors = [part.strip() for part in parts if part.strip()]
    assert len(selectors) > 20
    assert all(".mf-report" in selector for selector in selectors)


def test_all_text_is_escaped() -> None:
    chain = GroupReport(
        TEXT, (TEXT,), (TEXT,), (TEXT,), kernel=TEXT, reason=TEXT, wires=(Feed(None, 0, TEXT),)
    )
    markup = FusionReport([chain])._repr_html_()
    assert "<script" not in markup
    assert markup.count(html.escape(TEXT)) > 8
    assert Table(markup).rows[1] == [TEXT, f"{TEXT}\n{TEXT}", TEXT, "members 0", TEXT]


def test_module_names_with_markup_are_escaped_end_to_end() -> None:
    model = nn.ModuleDict({"<b>": nn.ModuleDict({"norm": Norm(), "mlp": Mlp()})})
    markup = fuse_modules(model, ["<b>.norm", "<b>.mlp"])._repr_html_()
    assert "<b>" not in markup
    assert Table(markup).rows[1][1] == f"<b>:\nnorm {ARROW} mlp\nNorm {ARROW} Mlp"


def test_a_table_escapes_texts_and_takes_html_as_it_is() -> None:
    made = table(["a & b", "c"], [["<x>", Markup("<code>y</code>")], Markup("<hr>")], caption="<z>")
    assert "<caption>&lt;z&gt;</caption>" in made
    assert '<th scope="col">a &amp; b</th>' in made
    assert "<td>&lt;x&gt;</td><td><code>y</code></td>" in made
    assert '<tr><td></td><td class="mf-wide" colspan="1"><hr></td></tr>' in made
    assert "<caption>" not in table(["a"], [])


def test_blocks_that_are_folded_have_one_drawing_with_their_calls_together() -> None:
    groups = [
        group(paths=(f"layers.{i}.norm", f"layers.{i}.mlp"), kernel="K", kernel_calls=2)
        for i in range(3)
    ]
    markup = FusionReport(groups)._repr_html_()
    assert markup.count("<svg") == 1
    assert f">kernel ran 6{TIMES}</text>" in markup


@pytest.mark.parametrize(
    ("fields", "state", "words"),
    [
        ({"kernel": "K", "path": "kernel"}, "kernel", "kernel will run"),
        ({"kernel": "K", "path": "kernel", "kernel_calls": 2}, "kernel", f"kernel ran 2{TIMES}"),
        ({"kernel": "K", "path": "kernel", "member_calls": 2}, "members", f"members ran 2{TIMES}"),
        ({"kernel": "K", "kernel_calls": 1, "member_calls": 2}, "mixed", "kernel 1, members 2"),
        ({"kernel": "K"}, "members", "members will run"),
        ({"member_calls": 5}, "off", f"members ran 5{TIMES}"),
        ({"kernel": "K", "path": "kernel", "action": "would fuse"}, "kernel", "kernel would run"),
        ({"action": "unfused", "kernel": "K", "kernel_calls": 2}, "off", "unfused"),
    ],
)
def test_a_drawing_tells_what_ran(fields: dict[str, Any], state: str, words: str) -> None:
    drawing = chain_drawing(group(**fields))
    assert f'class="mf-chain mf-{state}"' in drawing
    assert f">{words}</text>" in drawing
    assert f">{fields.get('kernel', 'no kernel')}</text>" in drawing


def test_a_drawing_says_in_words_what_it_shows() -> None:
    wires = (*STRAIGHT, Feed(None, 1, "residual"), Feed(None, 1, "scale", optional=True))
    drawing = chain_drawing(group(kernel="K", wires=wires, reason="mlp has a hook"))
    assert 'role="img"' in drawing
    assert f"<title>norm {ARROW} mlp: K, members will run</title>" in drawing
    assert (
        "<desc>Members: norm (Qwen3NORM), mlp (Qwen3MLP). Wires: x of norm from outside; x of mlp "
        "from norm; residual of mlp from outside; scale of mlp from outside, optional. mlp has a "
        "hook.</desc>"
    ) in drawing


def test_inputs_that_may_be_left_out_are_one_wire() -> None:
    optional = [Feed(None, 1, f"mask{i}", optional=True) for i in range(5)]
    drawing = chain_drawing(group(wires=(*STRAIGHT, *optional)))
    assert drawing.count("mf-optional") == 1
    assert ">5 optional</text>" in drawing


def test_a_place_that_was_skipped_has_no_drawing() -> None:
    assert "<svg" not in FusionReport([CHAINS[-1], LONG])._repr_html_()


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshots = _script()
needs_browser = pytest.mark.skipif(
    screenshots.browser() is None,
    reason="no browser: install Chromium, Debian's package `chromium`",
)

# Where things are and what colours they have, by the browser's own account.
MEASURE = """
function edges(e) { const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom]; }
function rgb(text) { return text.match(/[0-9.]+/g).map(Number); }
function under(x, y) {
  for (const e of document.elementsFromPoint(x, y)) {
    const style = getComputedStyle(e);
    const colour = e.tagName == "rect" ? style.fill : style.backgroundColor;
    if (colour != "none" && rgb(colour)[3] !== 0) return rgb(colour); }
  return null; }
function texts() {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const e = node.parentElement;
    if (!node.data.trim() || e.closest("style, script, title, desc")) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    const box = range.getClientRects()[0], style = getComputedStyle(e);
    found.push({text: node.data, drawn: e.tagName == "text",
      seen: box.left >= 0 && box.right <= document.documentElement.clientWidth,
      colour: rgb(e.tagName == "text" ? style.fill : style.color),
      under: under((box.left + box.right) / 2, (box.top + box.bottom) / 2)}); }
  return found; }
function chain(svg) {
  const all = name => [...svg.querySelectorAll(name)];
  const at = (path, length) => { const p = path.getPointAtLength(length).matrixTransform(
    path.getScreenCTM()); return [p.x, p.y]; };
  const place = svg.parentElement;
  return {svg: edges(svg), scrolls: place.scrollWidth > place.clientWidth,
    frame: edges(all(".mf-frame")[0]), boxes: all(".mf-box").map(edges),
    roles: all(".mf-role, .mf-class").map(edges),
    labels: all(".mf-label, .mf-kernel-name, .mf-state").map(edges),
    wires: all(".mf-wire").map(w => ({from: w.dataset.from, to: w.dataset.to,
      start: at(w, 0), end: at(w, w.getTotalLength()), points:
        Array.from({length: Math.ceil(w.getTotalLength())}, (_, i) => at(w, i))}))}; }
// The report's colour by the system's preference, then by what each kind of notebook says.
function themes() {
  const report = document.querySelector(".mf-report"), body = document.body;
  const shade = () => rgb(getComputedStyle(report).backgroundColor), found = {system: shade()};
  for (const [name, attribute, value] of [
    ["jupyter dark", "data-jp-theme-light", "false"],
    ["jupyter light", "data-jp-theme-light", "true"],
    ["vscode dark", "class", "vscode-dark"], ["vscode light", "class", "vscode-light"],
    ["contrast dark", "class", "vscode-high-contrast"],
    ["contrast light", "class", "vscode-high-contrast vscode-high-contrast-light"],
    ["site dark", "data-md-color-scheme", "slate"],
    ["site light", "data-md-color-scheme", "default"]]) {
    body.setAttribute(attribute, value); found[name] = shade(); body.removeAttribute(attribute); }
  return found; }
function narrow() {
  document.body.style.width = "400px";
  const found = [...document.querySelectorAll(".mf-report")].map(edges);
  document.body.style.width = ""; return found; }
function measure() {
  const root = document.documentElement;
  return {scroll: root.scrollWidth, width: root.clientWidth, texts: texts(),
    reports: [...document.querySelectorAll(".mf-report")].map(edges),
    cells: [...document.querySelectorAll(".mf-report td")].map(
      td => [td.scrollWidth, td.clientWidth]),
    aligned: getComputedStyle(document.querySelector(".mf-report td")).textAlign,
    chains: [...document.querySelectorAll(".mf-chain")].map(chain), themes: themes(),
    narrow: narrow()}; }
"""
# As JupyterLab styles tables in its outputs.
JUPYTER = """<style>.jp-RenderedHTMLCommon { font-size: 14px; }
.jp-RenderedHTMLCommon table { border: none; font-size: 12px; table-layout: fixed; }
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th, .jp-RenderedHTMLCommon tr {
  text-align: right; vertical-align: middle; padding: 0.5em; max-width: none; }
.jp-RenderedHTMLCommon tbody tr:nth-child(odd) { background: #c0ffee; }</style>"""
REPORT = FusionReport([*CHAINS, LONG])._repr_html_()
BODY = f'{JUPYTER}<div class="jp-RenderedHTMLCommon">{REPORT}</div>'


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request: pytest.FixtureRequest) -> Any:
    return {**screenshots.look(BODY, request.param, 900, 4000, MEASURE), "system": request.param}


def overlap(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(inner: list[float], outer: list[float]) -> bool:
    slack = 0.5
    return (
        outer[0] - slack <= inner[0]
        and outer[1] - slack <= inner[1]
        and inner[2] <= outer[2] + slack
        and inner[3] <= outer[3] + slack
    )


def on_edge(point: list[float], box: list[float]) -> bool:
    x, y = point
    near = [abs(x - box[0]), abs(x - box[2]), abs(y - box[1]), abs(y - box[3])]
    return inside([x, y, x, y], box) and min(near) < 0.5


@needs_browser
def test_no_two_things_in_a_drawing_are_on_top_of_each_other(seen: Any) -> None:
    assert len(seen["chains"]) == len([chain for chain in CHAINS if chain.wires])
    for chain in seen["chains"]:
        things = [*chain["boxes"], *chain["labels"]]
        for index, thing in enumerate(things):
            assert not any(overlap(thing, other) for other in things[:index])
            assert inside(thing, chain["svg"])
        assert all(inside(box, chain["frame"]) for box in chain["boxes"])
        for number, text in enumerate(chain["roles"]):
            assert inside(text, chain["boxes"][number // 2])


@needs_browser
def test_every_wire_starts_and_ends_at_a_box_or_outside(seen: Any) -> None:
    drawn = [chain for chain in CHAINS if chain.wires]
    for group_, chain in zip(drawn, seen["chains"], strict=True):
        ends = {(wire["from"], wire["to"]) for wire in chain["wires"]}
        last = str(len(group_.roles) - 1)
        wanted = {("" if w.source is None else str(w.source), str(w.member)) for w in group_.wires}
        assert ends == {*wanted, (last, "")}
        for wire in chain["wires"]:
            for end, point in ((wire["from"], wire["start"]), (wire["to"], wire["end"])):
                if end:
                    assert on_edge(point, chain["boxes"][int(end)])
                else:
                    assert not inside([*point, *point], chain["frame"])


@needs_browser
def test_no_wire_goes_through_text_another_box_or_along_another_wire(seen: Any) -> None:
    for chain in seen["chains"]:
        wires = [{(round(x), round(y)) for x, y in wire["points"]} for wire in chain["wires"]]
        for index, wire in enumerate(wires):
            assert all(len(wire & other) <= 3 for other in wires[:index])  # They may cross.
        for wire in chain["wires"]:
            for x, y in wire["points"]:
                assert not any(overlap([x, y, x, y], label) for label in chain["labels"])
                inner = [[a + 1, b + 1, c - 1, d - 1] for a, b, c, d in chain["boxes"]]
                assert not any(overlap([x, y, x, y], box) for box in inner)


@needs_browser
def test_nothing_is_wider_than_the_page(seen: Any) -> None:
    assert seen["scroll"] <= seen["width"]
    for left, _, right, _ in seen["reports"]:
        assert left >= 0
        assert right <= seen["width"]
    assert all(content <= width for content, width in seen["cells"])
    assert all(right <= 412 for _, _, right, _ in seen["narrow"])  # With the margin.


@needs_browser
def test_only_a_drawing_of_many_members_scrolls_and_it_leaves_room_for_the_notes(seen: Any) -> None:
    drawn = [chain for chain in CHAINS if chain.wires]
    for group_, chain in zip(drawn, seen["chains"], strict=True):
        assert chain["scrolls"] == (len(group_.roles) == 10)
    assert {text["seen"] for text in seen["texts"] if not text["drawn"]} == {True}


@needs_browser
def test_text_stands_out_from_what_is_behind_it(seen: Any) -> None:
    texts = [text for text in seen["texts"] if text["under"] is not None]
    assert len(texts) > 100
    for text in texts:
        light, dark = sorted((luminance(text["colour"]), luminance(text["under"])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text
    assert len({tuple(text["under"]) for text in texts}) == 3  # Page, and both tints.


def luminance(colour: list[float]) -> float:
    """The relative luminance of the Web Content Accessibility Guidelines 2.2."""
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in colour[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_browser
def test_the_notebook_does_not_restyle_the_table(seen: Any) -> None:
    assert seen["aligned"] == "left"
    assert [192, 255, 238] not in [text["under"] for text in seen["texts"]]


@needs_browser
def test_colours_follow_the_notebook_where_it_tells_else_the_system(seen: Any) -> None:
    assert len(seen["themes"]) == 9
    for name, colour in seen["themes"].items():
        theme = seen["system"] if name == "system" else name.rpartition(" ")[2]
        shade = luminance(colour)
        assert (shade > 0.9) if theme == "light" else (shade < 0.02), name


WORDS = """
function measure() {
  return [...document.querySelectorAll(".mf-report th")].flatMap(th => {
    const text = th.firstChild, found = [];
    for (const word of text ? text.data.matchAll(/\\S+/g) : []) {
      const range = document.createRange();
      range.setStart(text, word.index); range.setEnd(text, word.index + word[0].length);
      found.push([word[0], range.getClientRects().length]); }
    return found; }); }
"""


@needs_browser
def test_no_word_in_a_header_is_taken_apart_however_narrow_the_page() -> None:
    wide = table(["a long name", "argmax", "error / modules'"], [["differ" * 20, "1.0", "2.0"]])
    words = screenshots.look(page_fragment("wide", [wide]), "light", 500, 900, WORDS)
    named = ["a", "long", "name", "argmax", "error", "/", "modules'"]
    assert words == [[word, 1] for word in named]


@needs_browser
def test_the_picture_is_not_blank(tmp_path: Path) -> None:
    shades = {}
    for theme in ("light", "dark"):
        path = tmp_path / f"{theme}.png"
        screenshots.look(BODY, theme, 900, 700, image=path)
        picture = Image.open(path).convert("RGB")
        assert picture.size == (900, 700)
        colours = picture.getcolors(2**20)
        assert len(colours) > 100
        shades[theme] = max(colours)[1]
    assert min(shades["light"]) > 240
    assert max(shades["dark"]) < 40


@needs_browser
def test_a_picture_is_as_wide_as_its_widest_table() -> None:
    page = page_fragment("wide", [table(["header"] * 20, [["value"] * 20])])
    width = screenshots.width_of(page, "light", 500)
    assert width > 1000
    assert screenshots.width_of(page, "light", width) == width
    page = page_fragment("small", [table(["a"], [["b"]])])
    assert screenshots.width_of(page, "light", 500) == 500


def test_the_pictures_in_the_documentation_are_small_and_complete() -> None:
    images = SCRIPT.parent.parent / "docs" / "images"
    for name in screenshots.PICTURES:
        for theme in screenshots.THEMES:
            assert 10_000 < (images / f"{name}-{theme}.png").stat().st_size < 150_000
