"""Make the pictures of the documentation, in a headless browser, light and dark.

Run: python scripts/screenshots.py [NAME ...] [--out docs/images]

Needs Chromium (Debian's package `chromium`) and `pip install -e ".[test]"`. The models are tiny and
have random weights. To add a picture, write a function that returns HTML and mark it `@picture`.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
THEMES = {"light": 1, "dark": 0}
WIDTH = 860
PAGE = """\
<!doctype html><meta charset="utf-8">
<style>body {{ margin: 12px; color-scheme: light dark; background: light-dark(#fff, #0d0f12); }}
.mf-report + .mf-report {{ margin-top: 12px; }}</style>
{body}
<script>{script}
const out = document.createElement("pre"); out.id = "measured"; out.hidden = true;
out.textContent = JSON.stringify(measure()); document.body.append(out);
</script>
"""
# What a script says about a page is between these.
_MEASURED = re.compile(r'<pre id="measured"[^>]*>(.*?)</pre>', re.DOTALL)
_HEIGHT = """function measure() {
  return Math.ceil(document.body.getBoundingClientRect().bottom) + 12; }"""

# What a table has more than its box shows.
_HIDDEN = """function measure() {
  const boxes = [...document.querySelectorAll("*")];
  return Math.max(0, ...boxes.map(box => box.scrollWidth - Math.ceil(box.clientWidth))
    .filter((more, i) => getComputedStyle(boxes[i]).overflowX != "visible")); }"""

PICTURES: dict[str, Callable[[str], str]] = {}


def picture(make: Callable[[str], str]) -> Callable[[str], str]:
    """Add a picture, named as the function is; it takes the theme and returns HTML."""
    PICTURES[make.__name__] = make
    return make


@picture
def report(theme: str) -> str:
    """Reports of a language model and a vision model after a few calls."""
    import torch
    from torch import nn
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from module_fusion import FusionReport, fuse
    from module_fusion import report as report_of

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    language = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512, num_hidden_layers=8, num_key_value_heads=2, head_dim=16, **sizes
        )
    ).eval()
    vision = SiglipVisionModel(
        SiglipVisionConfig(num_hidden_layers=2, image_size=64, patch_size=16, **sizes)
    ).eval()
    blocks = language.model.layers
    nn.utils.parametrizations.weight_norm(blocks[7].mlp.up_proj)
    skipped = fuse(language).skipped
    fuse(vision, {"patch_embeddings": True})
    with torch.no_grad():
        for _ in range(3):
            language(torch.arange(8)[None])
            vision(torch.randn(1, 3, 64, 64))
        hook = blocks[4].mlp.register_forward_hook(lambda *call: None)
        language(torch.arange(8)[None])
        hook.remove()
    after = FusionReport([*report_of(language).groups, *skipped])
    return after._repr_html_() + report_of(vision)._repr_html_()


def _fused_language_model(dtype: Any) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from module_fusion import fuse

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512, num_hidden_layers=4, num_key_value_heads=2, head_dim=64,
            initializer_range=0.2, **sizes,
        )
    )  # fmt: skip
    model = model.to(dtype).eval()
    fuse(model)
    return model


@picture
def verification(theme: str) -> str:
    """`verify` of a language model, first with its kernels, then with one that lost a row."""
    import torch

    from module_fusion import verify

    model = _fused_language_model(torch.float32)
    with torch.no_grad():
        good = verify(model, torch.arange(8)[None], use_cache=False)
    seat = model.model.layers[2].mlp.fused_kernel
    kernel, prepare = seat.forward, seat.kernel.prepare

    def faulty(hidden_states: torch.Tensor) -> torch.Tensor:
        output = kernel(hidden_states).clone()
        output[:, -1] = 0
        return output

    faulty.prepare = prepare
    seat.forward = faulty
    with torch.no_grad():
        bad = verify(model, torch.arange(8)[None], use_cache=False)
    return good._repr_html_() + bad._repr_html_()


@picture
def benchmark(theme: str) -> str:
    """`benchmark` of a vision-language model's patch embedding, with its plot."""
    import matplotlib.pyplot as plt
    import torch
    from torch import nn

    from module_fusion import benchmark as measure
    from module_fusion import fuse

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 1280, (2, 14, 14), stride=(2, 14, 14)), nn.Flatten())
    fuse(model)
    patches = torch.randn(256, 3, 2, 14, 14)  # one patch a row, as in Qwen2-VL
    found = measure(model, patches, seconds=3.0, progress=False)
    drawn = io.BytesIO()
    with plt.style.context("dark_background" if theme == "dark" else "default"):
        axes = found.plot()
        axes.figure.savefig(drawn, format="png", dpi=200, transparent=True, bbox_inches="tight")
        plt.close(axes.figure)
    data = base64.b64encode(drawn.getvalue()).decode()
    return f'{found._repr_html_()}<img width="600" src="data:image/png;base64,{data}" alt="">'


def browser() -> str | None:
    """The browser's program, None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(
    body: str,
    theme: str,
    width: int = WIDTH,
    height: int = 2000,
    script: str = _HEIGHT,
    image: Path | None = None,
    scale: float = 1,
) -> Any:
    """Open HTML in the browser.

    Args:
        body: the page's content.
        theme: what the system prefers, `"light"` or `"dark"`.
        width: of the window, in CSS pixels.
        height: of the window, in CSS pixels.
        script: defines `measure()`, which is called when all is laid out.
        image: where to put a picture of the window, if one is wanted.
        scale: pixels of the picture per CSS pixel.

    Returns:
        What `measure()` returned; None where a picture was taken.
    """
    program = browser()
    if program is None:
        raise SystemExit("There is no browser. Install Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        page.write_text(PAGE.format(body=body, script=script), encoding="utf-8")
        what = ["--dump-dom"] if image is None else [f"--screenshot={image}"]
        done = subprocess.run(
            [
                program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
                f"--blink-settings=preferredColorScheme={THEMES[theme]}",
                f"--window-size={width},{height}", f"--force-device-scale-factor={scale}",
                *what, page.as_uri(),
            ],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    if image is not None:
        return None
    found = _MEASURED.search(done.stdout)
    assert found is not None, done.stderr
    return json.loads(unescape(found[1]))


def width_of(body: str, theme: str, least: int = WIDTH) -> int:
    """The width of the window in which nothing has to be scrolled to be seen."""
    return least + int(look(body, theme, least, script=_HIDDEN))


def take(name: str, theme: str, out: Path) -> Path:
    """Take one picture, as a small PNG."""
    from PIL import Image

    body = PICTURES[name](theme)
    path = out.resolve() / f"{name}-{theme}.png"
    width = width_of(body, theme)
    look(body, theme, width, look(body, theme, width), image=path, scale=2)
    few_colours = Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(PICTURES))
    if unknown:
        parser.error(f"no picture {unknown[0]!r}; there are {', '.join(PICTURES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        for theme in THEMES:
            path = take(name, theme, options.out)
            print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
