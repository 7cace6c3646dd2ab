"""A page in headless Chromium: what it shows at several widths, what it asks the network for, what its console says."""

import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CONTROL = """<!doctype html><title>calm</title><body><h3 style="width:3000px">wide</h3><img src="SERVER/control.png">
<script>document.title = "pwned"; console.error("control")</script>"""
LOOK = """<!doctype html><meta charset="utf-8"><body><script>
const found = [], wanted = WANTED;
function look(file, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => {
    const page = frame.contentDocument, at = (link) => page.getElementById(link.hash.slice(1));
    const inside = (link) => link.getAttribute("href").startsWith("#");
    for (const folded of page.querySelectorAll("details")) folded.open = true;
    const wide = [...page.body.querySelectorAll("*")]
      .filter((e) => !e.closest("table") && e.getBoundingClientRect().right > width + 1)
      .map((e) => e.outerHTML.slice(0, 200));
    found.push({
      file, width, title: page.title, scripts: page.scripts.length, wide, text: page.body.innerText,
      overflow: page.documentElement.scrollWidth - width, alts: [...page.images].map((i) => i.alt),
      broken: [...page.images].filter((i) => !i.complete || !i.naturalWidth).length,
      dead: [...page.links].filter((a) => inside(a) && !at(a)).length, links: page.links.length,
      outside: [...page.links].filter((a) => !inside(a)).map((a) => a.getAttribute("href")),
    });
    if (found.length == wanted.length) document.body.dataset.found = JSON.stringify(found);
  };
  frame.src = file;
  document.body.append(frame);
}
for (const [file, width] of wanted) look(file, width);
</script>"""


class Seen(NamedTuple):
    pages: dict[tuple[str, int], dict[str, Any]]  # by file and width
    asked: list[str]  # of the server
    console: list[str]


def look(folder: Path, write: Callable[[Path, str], object], widths: Sequence[int] = (400, 1200)) -> Seen:
    """What a browser makes of FOLDER/report.html, which `write` makes, and of a page with faults, control.html.

    `write` is given the folder and the address of a server that remembers what it is asked for. Skips the test where
    there is no browser.
    """
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: install it to check the report in a browser (apt install chromium)")
    asked: list[str] = []

    class Remember(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Remember)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    write(folder, address)
    (folder / "control.html").write_text(CONTROL.replace("SERVER", address))
    wanted = [("control.html", widths[0]), *(("report.html", width) for width in widths)]
    (folder / "look.html").write_text(LOOK.replace("WANTED", json.dumps(wanted)))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
        (folder / "look.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    server.shutdown()
    server.server_close()
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    pages = {(page["file"], page["width"]): page for page in json.loads(html.unescape(found[1]))}
    return Seen(pages, asked, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
