"""The report in a real browser: on a phone's width and a desktop's, in light and in dark, nothing sticks out."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

WIDTHS = {"phone": 360, "desktop": 1280}
HEIGHT = 900
SCHEMES = {"dark": 0, "light": 1}  # Chromium's own numbers
PROBE = """<script>
addEventListener("load", () => {
  const page = document.scrollingElement, out = [];
  for (const text of document.querySelectorAll("svg text")) {
    const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect();
    if (a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1)
      out.push(text.textContent);
  }
  const wide = [...document.querySelectorAll("main *")].filter(
    (e) => !e.closest(".scroll, svg") && e.getBoundingClientRect().right > page.clientWidth + 1)
    .map((e) => e.outerHTML.slice(0, 80));
  parent.postMessage({
    name: location.hash.slice(1), scroll: page.scrollWidth, client: page.clientWidth, out, wide,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map((e) => e.name),
    svgs: document.querySelectorAll("svg").length,
  }, "*");
});
</script></body>"""
COLLECT = """<script>
addEventListener("message", (event) => {
  const item = document.createElement("pre");
  item.textContent = JSON.stringify(event.data);
  document.body.append(item);
});
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here")


@pytest.fixture(scope="module")
def page(reported_run: Path) -> str:
    """A report, its policy opened for the probe's script."""
    report = (reported_run / "report.html").read_text(encoding="utf-8")
    policy = "default-src 'none'"
    assert policy in report
    return report.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</body>", PROBE)


def open_in(browser: str, page: str, scheme: str, folder: Path) -> tuple[dict[str, dict[str, object]], Path]:
    """What the probe finds at each width, and a screenshot with all widths side by side."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html#{name}" style="border:0;width:{width}px;height:{HEIGHT}px"></iframe>'
        for name, width in WIDTHS.items()
    )
    # A browser's window has a least width of its own; a frame can be as narrow as a phone.
    (folder / "index.html").write_text(f'{COLLECT}<body style="margin:0;white-space:nowrap">{frames}</body>')
    picture = folder / f"{scheme}.png"
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            f"--window-size={sum(WIDTHS.values()) + 20},{HEIGHT}", "--virtual-time-budget=3000",
            f"--screenshot={picture}", "--dump-dom", (folder / "index.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    found = [json.loads(html.unescape(item)) for item in re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)]
    return {str(item["name"]): item for item in found}, picture


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_sticks_out_and_nothing_is_fetched(browser: str, page: str, scheme: str, tmp_path: Path) -> None:
    found, picture = open_in(browser, page, scheme, tmp_path)
    assert set(found) == set(WIDTHS)
    for name, width in WIDTHS.items():
        one = found[name]
        assert one["client"] == width
        assert one["scroll"] == width, one["wide"]
        assert one["wide"] == []
        assert one["out"] == []
        assert one["requests"] == []
        assert int(str(one["svgs"])) >= 8
        ink, paper = (np.mean([int(n) for n in re.findall(r"\d+", str(one[key]))[:3]]) for key in ("ink", "paper"))
        assert (paper > ink + 150) if scheme == "light" else (ink > paper + 150)
    shown = imread(picture)[:, :, :3]
    assert (shown.mean() > 0.75) if scheme == "light" else (shown.mean() < 0.25)
    assert shown.std() > 0.03  # something is drawn
