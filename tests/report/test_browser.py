"""Pages as a reader's browser shows them: headless Chromium, where it is installed."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from stage_ray.cli import main
from tests.fake_run import write_fake_run
from tests.report.test_compare import configure

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing that a browser does by itself: no updates, no looking up of its maker's hosts.
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--enable-logging=stderr",  # what pages write to their consoles
]
WIDTHS, SCHEMES = (400, 1600), ("light", "dark")
SMALLEST_PX, CONTRAST = 11, 4.5  # of letters; WCAG 2.1 AA for text

# Frames of each width and colour scheme around the page, and what a reader would see in each.
FRAMES = """<!doctype html><title>frames</title><body><pre id="seen"></pre><script>
const seen = {};
const luminance = (text) => {
  const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = text.match(/[\\d.]+/g).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const look = (frame, name) => {
  const view = frame.contentWindow, page = frame.contentDocument, root = page.documentElement;
  const ground = luminance(view.getComputedStyle(page.body).backgroundColor);
  const texts = [...page.querySelectorAll("h1, h2, p, td, th, figcaption, summary, span, b")]
    .filter((e) => e.checkVisibility() && e.textContent.trim());
  seen[name] = {
    overflow: root.scrollWidth - view.innerWidth,
    ground,
    contrast: Math.min(...texts.map((e) => contrast(luminance(view.getComputedStyle(e).color), ground))),
    letters: Math.min(...texts.map((e) => parseFloat(view.getComputedStyle(e).fontSize))),
    pictures: [...page.images].map((image) => image.naturalWidth),
    charts: [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
    fetched: view.performance.getEntriesByType("resource").map((entry) => entry.name)
      .filter((name) => !name.startsWith("data:")),
  };
  document.getElementById("seen").textContent = JSON.stringify(seen);
};
for (const width of %s) for (const scheme of %s) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; color-scheme: ${scheme}`;
  frame.onload = () => look(frame, `${width} ${scheme}`);
  frame.src = "page.html";
  document.body.append(frame);
}
</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for recipe in ("grpo", "stage"):
        write_fake_run(root / recipe)
        configure(root / recipe, recipe=recipe)
    return root


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory, and the address under which its files are served on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_page_reads_well_on_a_phone_and_a_screen_in_light_and_dark_and_fetches_nothing(
    command, runs, served, tmp_path
):
    directory, address = served
    if command == "report":
        assert main(["report", str(runs / "stage")]) == 0
        shutil.copy(runs / "stage" / "report.html", directory / "page.html")
    else:
        assert main(["compare", str(runs / "grpo"), str(runs / "stage"), "--page", str(directory / "page.html")]) == 0
    (directory / "frames.html").write_text(FRAMES % (list(WIDTHS), list(SCHEMES)))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    # Chromium prints the document when the page and all its frames have loaded.
    done = subprocess.run(
        [str(CHROMIUM), *QUIET, profile, "--dump-dom", f"{address}/frames.html"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout).group(1))
    assert set(seen) == {f"{width} {scheme}" for width in WIDTHS for scheme in SCHEMES}
    assert "CONSOLE" not in done.stderr, done.stderr
    for name, view in seen.items():
        assert view["fetched"] == [], name
        assert view["overflow"] <= 0, f"{name}: the page is wider than its window"
        assert view["contrast"] >= CONTRAST and view["letters"] >= SMALLEST_PX, name
        assert view["pictures"] and all(view["pictures"]), f"{name}: a picture does not show"
        assert view["charts"] and all(width > 200 for width in view["charts"]), f"{name}: a chart is a stamp"
        assert (view["ground"] < 0.1) == name.endswith("dark"), name
