import shutil
import subprocess

import made
import pytest

from kvfold.bench.report import page as report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

# Clicks the head "score" of the first table twice and writes what the browser then shows to where it can be read.
CLICKS = """<script>
const table = document.querySelector("table.sortable");
const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent === "score");
const column = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[head.cellIndex].textContent)).join(" ");
const seen = [column()];
for (const _ of [1, 2]) { head.firstChild.click(); seen.push(column()); }
document.title = seen.join("; ");
</script></body>"""


def open_page(path, folder) -> tuple[str, str]:
    """The page as the browser ends up with it, and what it said on its console."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={folder}", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_real_browser_shows_the_page_without_an_error_and_sorts_it(tmp_path):
    page = report.write(made.run(), tmp_path)
    page.write_text(page.read_text().replace("</body>", CLICKS))
    shown, said = open_page(page, tmp_path / "profile")
    assert said == ""
    title = shown.split("<title>")[1].split("</title>")[0]
    before, up, down = ([float(word) for word in part.split()] for part in title.split("; "))
    assert before != up
    assert up == sorted(before)
    assert down == sorted(before, reverse=True)


def test_the_browser_would_have_told_of_an_error(tmp_path):
    page = report.write(made.run(), tmp_path)
    page.write_text(page.read_text().replace("</body>", "<script>thereIsNoSuchThing()</script></body>"))
    assert "thereIsNoSuchThing" in open_page(page, tmp_path / "profile")[1]
