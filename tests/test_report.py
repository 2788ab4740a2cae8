"""The report in a real Chromium and through a real LaTeX: what a reader sees, does, and cannot be harmed by."""

from __future__ import annotations

import base64
import http.server
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from calling import call
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from ablations.planner import plan
from analysis.publish import publish
from analysis.render import measured_text
from analysis.report import pdf, report
from analysis.report.page import plain
from analysis.report.tex import text
from analysis.study import Study, study
from analysis.universe import make
from analysis.verdicts import judge_study
from sdae.errors import RunFailed
from sdae.files import read_json
from sdae.store import Store, SyntheticStore

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "examples/mask_ratio.yaml"
BROWSER = ("chromium", "chromedriver")
pytestmark = pytest.mark.xdist_group("report")  # one store and one browser
CELL = "table2.sdae-300.finetune"


class Made(NamedTuple):
    study: Study
    folder: Path
    url: str


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    store = SyntheticStore(tmp_path_factory.mktemp("report") / "runs")
    make(store, plan(scale="paper", seeds=(0, 1), content=store.fingerprint))
    return store


@pytest.fixture(scope="module")
def made(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Made:
    found, out = study(store, (), "paper"), tmp_path_factory.mktemp("out")
    report(found, judge_study(found), out)
    return Made(found, out, (out / "report.html").as_uri())


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if lacking := [name for name in BROWSER if not shutil.which(name)]:
        stop = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        stop(f"no browser for tests: {', '.join(lacking)} not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    quiet = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", profile, *quiet):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Both paths are given, so that Selenium does not go and look for a driver on the net
    browser = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    yield browser
    browser.quit()


@pytest.fixture
def page(driver: webdriver.Chrome, made: Made) -> webdriver.Chrome:
    return show(driver, made.url)


def show(
    driver: webdriver.Chrome, url: str, width: int = 1280, dark: bool = False, scripts: bool = True
) -> webdriver.Chrome:
    command = driver.execute_cdp_cmd
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    command("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    command("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    command("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(url)
    return driver


def find(page: webdriver.Chrome, selector: str) -> WebElement:
    return page.find_element(By.CSS_SELECTOR, selector)


def rows(page: webdriver.Chrome, selector: str) -> list[list[str]]:
    """The visible rows of a table as texts."""
    script = """return [...document.querySelectorAll(arguments[0] + " tbody tr")].filter(r => !r.hidden)
                .map(r => [...r.cells].map(c => c.textContent))"""
    return page.execute_script(script, selector)  # type: ignore[no-any-return]


def column(page: webdriver.Chrome, name: str) -> list[str]:
    """A column of the runs, over all of their pages."""
    heads = [head.text.strip(" ↑↓\u2002") for head in page.find_elements(By.CSS_SELECTOR, "#runs-table thead th")]
    values: list[str] = []
    while True:
        values += [row[heads.index(name)] for row in rows(page, "#runs-table")]
        following = find(page, "#runs-next")
        if not following.is_enabled():
            return values
        press(page, following)


def press(page: webdriver.Chrome, element: WebElement) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def head(page: webdriver.Chrome, name: str) -> WebElement:
    return page.find_element(By.XPATH, f"//*[@id='runs-table']/thead//th[button[text()='{name}']]")


# Content


def test_nothing_is_said_to_the_console_and_nothing_is_loaded(page: webdriver.Chrome) -> None:
    for word in ("runs-text", "claims-text"):
        find(page, f"#{word}").send_keys("folds")
    press(page, find(page, f"td[data-cell='{CELL}'] button"))
    assert [entry["message"] for entry in page.get_log("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)
    assert [url[:80] for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1


def test_no_request_leaves_the_page_even_if_it_is_told_to(page: webdriver.Chrome) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.block_on_close = False  # the browser may hold a connection on which it has asked for nothing
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = """const url = arguments[0], done = arguments[1], image = new Image();
        image.src = url + "/image"; document.body.append(image);
        for (const [tag, name] of [["script", "src"], ["iframe", "src"], ["link", "href"]]) {
          const made = document.createElement(tag); made[name] = url + "/" + tag; made.rel = "stylesheet";
          document.body.append(made);
        }
        fetch(url + "/fetch").then(() => done("fetched"), () => setTimeout(() => done("refused"), 300));"""
    try:
        outcome = page.execute_async_script(script, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert (outcome, asked) == ("refused", [])


def test_every_table_shows_what_was_measured_beside_what_is_printed(page: webdriver.Chrome, made: Made) -> None:
    titles = [element.text for element in page.find_elements(By.CSS_SELECTOR, "table.sdae caption strong")]
    assert titles[:5] == [f"Table {n}." for n in range(1, 6)]
    cell = made.study.cells[CELL]
    assert cell.estimate is not None
    shown = find(page, f"td[data-cell='{CELL}']").text
    assert shown.startswith(f"{cell.estimate.mean:.2f} ±")
    assert "84.1" in find(page, "#table2 + .wide tr:has(td[data-cell='table2.sdae-300.finetune'])").text
    measured = {name for name, one in made.study.cells.items() if one.estimate}
    named = page.execute_script(
        "return [...document.querySelectorAll('td[data-cell] button')].map(b => b.parentElement.dataset.cell)"
    )
    assert measured <= set(named)


def test_the_summary_counts(page: webdriver.Chrome, made: Made) -> None:
    words = " ".join(find(page, "#summary").text.split())
    cells = [cell for cell in made.study.cells.values() if cell.planned]
    assert f"{sum(cell.estimate is not None for cell in cells)} of {len(cells)} that runs feed" in words
    verdicts = [entry["verdict"] for entry in judge_study(made.study)]
    for verdict in ("supported", "contradicted", "undecided"):
        assert f"{verdicts.count(verdict)} {verdict}" in words
    assert f"{made.study.sweep.unique} planned" in words
    assert re.search(r"[\d,.]+ GPU-hours", words)


def test_synthetic_results_cannot_be_taken_for_real_ones(driver: webdriver.Chrome, made: Made) -> None:
    for width, scripts in itertools.product((1280, 375), (True, False)):
        page = show(driver, made.url, width, scripts=scripts)
        page.execute_script("window.scrollTo(0, 6000)")
        banner = find(page, ".synthetic")
        place = page.execute_script("return arguments[0].getBoundingClientRect().top", banner)
        assert (banner.text.startswith("SYNTHETIC RESULTS"), place) == (True, 0)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert find(page, ".synthetic").is_displayed()
    printed = made.folder / "printed.pdf"
    printed.write_bytes(base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]))
    if reader := shutil.which("pdftotext"):
        sheets = subprocess.run([reader, printed, "-"], capture_output=True, text=True, check=True).stdout.split("\f")
        assert all("SYNTHETIC RESULTS made up" in sheet for sheet in sheets[:-1])
    assert "SYNTHETIC" in driver.title
    assert "SYNTHETIC" in (made.folder / "report.tex").read_text()


# Runs


def test_runs_are_sorted_by_a_click_and_by_the_keyboard(page: webdriver.Chrome) -> None:
    press(page, find(page, "#runs-table th button"))  # is sorted by it: turns round
    names = column(page, "Run")
    assert names == sorted(names, reverse=True)
    assert len(names) == len(set(names)) > 100
    top1 = head(page, "Top-1 (%)")
    for way in ("ascending", "descending"):
        top1.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert top1.get_attribute("aria-sort") == way
        values = column(page, "Top-1 (%)")
        known = [float(value) for value in values if value]
        assert known == sorted(known, reverse=way == "descending")
        assert not any(values[len(known) :])  # what has none comes last, whichever way
    others = page.find_elements(By.CSS_SELECTOR, "#runs-table th[aria-sort=none]")
    assert len(others) == len(page.find_elements(By.CSS_SELECTOR, "#runs-table th[scope=col]")) - 1


def test_runs_are_filtered_by_stage_state_and_text(page: webdriver.Chrome, made: Made) -> None:
    frame = made.study.frame
    Select(find(page, "#runs-stage")).select_by_visible_text("linprobe")
    assert set(column(page, "Stage")) == {"linprobe"}
    Select(find(page, "#runs-state")).select_by_visible_text("done")
    expected = frame[(frame["stage"] == "linprobe") & (frame["state"] == "done")]
    assert sorted(column(page, "Run")) == sorted(expected.index)
    assert find(page, "#runs-count").text.startswith(f"{len(expected)} of ")
    one = str(expected.index[0])
    find(page, "#runs-text").send_keys(one.upper())
    assert column(page, "Run") == [one]
    find(page, "#runs-text").send_keys("no such run")
    assert column(page, "Run") == []


def test_ten_thousand_runs_stay_usable(driver: webdriver.Chrome, made: Made, tmp_path: Path) -> None:
    """The same page, its list of runs told many times over."""
    source = (made.folder / "report.html").read_text()
    opening = '<script type="application/json" id="data">'
    start = source.index(opening) + len(opening)
    end = source.index("</script>", start)
    data = json.loads(source[start:end])
    few = data["runs"]["rows"]
    data["runs"]["rows"] = [[f"{row[0]}{n:03d}", *row[1:]] for n in range(10_000 // len(few) + 1) for row in few]
    count = len(data["runs"]["rows"])
    file = tmp_path / "many.html"
    file.write_text(source[:start] + json.dumps(data).replace("<", "\\u003c") + source[end:])
    page = show(driver, file.as_uri())
    assert find(page, "#runs-count").text == f"{count:,} of {count:,} runs"
    script = """const start = performance.now();
        document.querySelectorAll("#runs-table th button")[arguments[0]].click();
        document.body.getBoundingClientRect(); return performance.now() - start"""
    assert min(page.execute_script(script, n) for n in range(4)) < 3000, "milliseconds to sort"
    assert len(rows(page, "#runs-table")) == 50


# Claims


def test_claims_are_filtered_by_verdict_and_text(page: webdriver.Chrome, made: Made) -> None:
    entries = judge_study(made.study)
    Select(find(page, "#claims-verdict")).select_by_value("supported")
    supported = [entry for entry in entries if entry["verdict"] == "supported"]
    shown = rows(page, "#claims-table")
    assert len(shown) == len(supported)
    assert all(entry["claim"] in row[0] for entry, row in zip(supported, shown, strict=True))
    Select(find(page, "#claims-verdict")).select_by_value("")
    find(page, "#claims-text").send_keys("MULTI-FOLD")
    assert len(rows(page, "#claims-table")) == sum("multi-fold" in json.dumps(e["quote"]).lower() for e in entries)


# What is known of a cell


def test_a_cell_opens_by_mouse_and_closes(page: webdriver.Chrome, made: Made) -> None:
    dialog = find(page, "#provenance")
    button = find(page, f"td[data-cell='{CELL}'] button")
    assert not dialog.is_displayed()
    press(page, button)
    assert dialog.is_displayed()
    words = dialog.text
    for run in made.study.cells[CELL].runs:
        assert run in words
    assert "Table 2: SdAE, Finetune" in words
    find(page, "#provenance form button").click()
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == button


def test_a_cell_opens_by_keyboard_and_closes(page: webdriver.Chrome) -> None:
    button, dialog = find(page, f"td[data-cell='{CELL}'] button"), find(page, "#provenance")
    button.send_keys(Keys.ENTER)
    assert dialog.is_displayed()
    inside = "return arguments[0].contains(document.activeElement) || document.activeElement === document.body"
    for _ in range(12):  # the keyboard stays in it
        page.switch_to.active_element.send_keys(Keys.TAB)
        assert page.execute_script(inside, dialog)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == button


def test_a_run_named_there_leads_to_its_row(page: webdriver.Chrome, made: Made) -> None:
    find(page, "#runs-text").send_keys("nothing like this")
    press(page, find(page, f"td[data-cell='{CELL}'] button"))
    run = made.study.cells[CELL].runs[0]
    press(page, page.find_element(By.XPATH, f"//*[@id='provenance-body']//button[text()='{run}']"))
    assert not find(page, "#provenance").is_displayed()
    row = find(page, "#runs-table tr.found")
    assert row.text.startswith(run)
    assert page.switch_to.active_element == row


# For every reader

CONTRAST = """
const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const poor = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let seen = 0;
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const owner = node.parentElement;
  if (!node.data.trim() || !owner.checkVisibility() || owner.closest("script, option, :disabled")) continue;
  let behind = owner;
  while (behind && numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const colours = [getComputedStyle(owner).color, getComputedStyle(behind ?? document.documentElement).backgroundColor];
  const [a, b] = colours.map(numbers).map(light).sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
  seen += 1;
  if (ratio < 4.5) poor.push([owner.tagName, owner.className, node.data.trim().slice(0, 30), ratio]);
}
return [seen, getComputedStyle(document.body).backgroundColor, poor];
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(driver: webdriver.Chrome, made: Made, dark: bool) -> None:
    page = show(driver, made.url, dark=dark)
    page.execute_script(
        "document.querySelectorAll('td[data-cell]').forEach((c, n) => n % 3 || c.classList.add('stale'))"
    )
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    press(page, find(page, f"td[data-cell='{CELL}'] button"))
    seen, background, poor = page.execute_script(CONTRAST)
    assert seen > 1000
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    assert poor == []


def test_light_and_dark_are_chosen_and_remembered(driver: webdriver.Chrome, made: Made) -> None:
    page = show(driver, made.url)
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    press(page, find(page, "#theme"))
    assert find(page, "#theme").get_attribute("aria-pressed") == "true"
    dark = page.execute_script(background)
    assert dark != light
    assert show(driver, made.url).execute_script(background) == dark
    press(page, find(page, "#theme"))
    assert page.execute_script(background) == light
    page.execute_script("localStorage.clear()")


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_nothing_scrolls_sideways_on_a_phone_but_tables(driver: webdriver.Chrome, made: Made, scripts: bool) -> None:
    page = show(driver, made.url, 375, scripts=scripts)
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.execute_script("return document.documentElement.scrollWidth") == 375
    wide = page.execute_script(
        "return [...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth).length"
    )
    assert wide >= 5
    unreachable = "return [...document.querySelectorAll('.wide')].filter(w => !w.hidden && w.tabIndex !== 0).length"
    assert page.execute_script(unreachable) == 0
    if scripts:
        press(page, find(page, f"td[data-cell='{CELL}'] button"))
        box = page.execute_script(
            "const d = document.querySelector('dialog'); return [d.scrollWidth - d.clientWidth, d.offsetWidth]"
        )
        assert box[0] == 0
        assert box[1] <= 375


def test_the_page_is_in_order_for_a_screen_reader(page: webdriver.Chrome) -> None:
    levels = page.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(page.find_elements(By.CSS_SELECTOR, f"body > {landmark}")) == 1
    assert page.execute_script("return document.documentElement.lang") == "en"
    pictures = page.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 3
    for picture in pictures:
        assert re.search(r"Figure 4\([abc]\).*points measured", picture.get_attribute("alt") or "") is not None
        assert page.execute_script("return arguments[0].naturalWidth", picture) > 100
    bare = """return [...document.querySelectorAll('table')].filter(t => !t.caption).length
              + [...document.querySelectorAll('th')].filter(t => !t.scope).length
              + [...document.querySelectorAll('input, select')].filter(i => !i.labels.length).length
              + [...document.querySelectorAll('button')].filter(b => !(b.textContent.trim() || b.ariaLabel)).length"""
    assert page.execute_script(bare) == 0
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    links = page.execute_script("return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_first_tab_skips_to_the_results_and_focus_is_seen(page: webdriver.Chrome) -> None:
    find(page, "body").send_keys(Keys.TAB)
    link = page.switch_to.active_element
    assert link.text == "Skip to the results"
    outline = page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", link)
    assert outline == "solid"


def test_without_scripts_all_is_readable(driver: webdriver.Chrome, made: Made) -> None:
    page = show(driver, made.url, scripts=False)
    words = page.execute_script("return document.body.innerText")
    assert "Table 5." in words
    assert judge_study(made.study)[0]["quote"] in words
    assert all(run in words for run in made.study.frame.index)
    assert not find(page, "#theme").is_displayed()
    assert not find(page, "#claims-text").is_displayed()


# LaTeX and PDF


def unspaced(words: str) -> str:
    return re.sub(r"[\s{}]+|\\allowbreak", "", words)


def test_the_latex_holds_every_table_and_claim(made: Made) -> None:
    source = unspaced((made.folder / "report.tex").read_text())
    for table in made.study.tables.values():
        for row, column in itertools.product(table.rows, table.columns):
            if (cell := row.cells.get(column.name)) is not None:
                assert unspaced(text(measured_text(cell, column))) in source
    for entry in judge_study(made.study):
        assert unspaced(text(plain(entry["quote"]))) in source


@pytest.mark.skipif(pdf.engine() is None, reason="neither pdflatex nor tectonic is installed")
def test_the_pdf_is_the_same_each_time_and_holds_every_table(made: Made, tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        folder = shutil.copytree(made.folder, tmp_path / name)
        files.append(pdf.typeset(folder / "report.tex", 1_700_000_000, str(pdf.engine())))
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(b"%PDF")
    if "pdflatex" in str(pdf.engine()):
        assert first == second
    if reader := shutil.which("pdftotext"):
        words = subprocess.run([reader, "-layout", files[0], "-"], capture_output=True, text=True, check=True).stdout
        for name in [f"Table {n}" for n in range(1, 6)] + [f"Figure 4({p})" for p in "abc"]:
            assert name in words
        assert words.count("SYNTHETIC RESULTS") >= words.count("\f")
    assert not list(tmp_path.glob("*/*.log"))


def test_an_error_of_latex_is_told_with_its_line(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine := pdf.engine():
        document = tmp_path / "report.tex"
        document.write_text("\\documentclass{article}\n\\begin{document}\n\\nosuchthing\n\\end{document}\n")
        with pytest.raises(RunFailed, match=r"report\.tex.*Undefined control sequence"):
            pdf.typeset(document, 0, engine)
        assert not document.with_suffix(".pdf").exists()
    broken = tmp_path / "bin" / "pdflatex"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho './report.tex:7: LaTeX Error: File broken.sty not found.'\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(broken.parent), prepend=os.pathsep)
    arguments = ("--scale", "paper", "--store", made.study.store.root, "--out", tmp_path / "out")
    called = call("paper", "report", "table5", *arguments)
    assert (called.code, called.out) == (1, "")
    assert "File broken.sty not found" in called.err


# The command


def test_the_command_writes_the_files_and_says_why_there_is_no_pdf(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "ENGINES", ("no-such-engine",))
    words = ("paper", "report", "table5", "figure4b", "--scale", "paper", "--store", made.study.store.root)
    called = call(*words, "--out", tmp_path / "a", "--json")
    assert called.code == 0
    assert called.err.startswith("no report.pdf: none of no-such-engine is installed (Debian: texlive")
    written = json.loads(called.out)["files"]
    assert [Path(name).name for name in written] == ["report.html", "report.tex", "figure4b.pdf"]
    assert call(*words, "--out", tmp_path / "b").code == 0
    for name in written:
        assert Path(name).read_bytes() == (tmp_path / "b" / Path(name).name).read_bytes()


def test_an_empty_store_makes_a_report_that_says_so(driver: webdriver.Chrome, tmp_path: Path) -> None:
    called = call("paper", "report", "--store", tmp_path / "none", "--out", tmp_path)
    assert called.code == 0, called
    page = show(driver, (tmp_path / "report.html").as_uri())
    words = find(page, "body").text
    assert "none has ended" in words
    assert "0 of 114 that runs feed" in words
    assert "SYNTHETIC" not in words
    assert set(column(page, "State")) == {"not run"}
    assert page.get_log("browser") == []


def test_a_users_own_artifact_stands_beside_the_papers(driver: webdriver.Chrome, tmp_path: Path) -> None:
    store = SyntheticStore(tmp_path / "runs")
    make(store, plan([OWN, "table5"], "smoke", (0, 1), content=store.fingerprint), missing=0, faults=0)
    found = study(store, [OWN, "table5"], "smoke")
    report(found, judge_study(found), tmp_path)
    page = show(driver, (tmp_path / "report.html").as_uri())
    own = found.tables[OWN.stem]
    assert find(page, f"#{OWN.stem}").get_attribute("textContent") == OWN.stem
    assert own.title in page.execute_script("return document.body.textContent")
    name = next(cell.cell for cell in own.cells() if cell.estimate)
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    press(page, find(page, f"td[data-cell='{name}'] button"))
    assert found.cells[name].runs[0] in find(page, "#provenance").text


def test_text_from_a_store_is_never_code(driver: webdriver.Chrome, tmp_path: Path) -> None:
    """A failed run's message and a user's labels are shown as they stand, in the page and in its data."""
    evil = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>\\input{x} $ % &"
    file = tmp_path / "own.yaml"
    lines = OWN.read_text()
    file.write_text(re.sub(r"(?m)^title: .*$", lambda _: f"title: {json.dumps(evil)}", lines))
    store = SyntheticStore(tmp_path / "runs")
    sweep = plan([file], "smoke", (0,), content=store.fingerprint)
    make(store, sweep, missing=0, faults=0)
    victim = store.run(next(i for i, run in sweep.runs.items() if run.config.stage == "finetune"))
    result = read_json(victim.path / "result.json")
    (victim.path / "result.json").unlink()
    victim.write("failure.json", {"class": "Error", "message": evil, "traceback": "", "attempt": 1, "time": 0.0})
    assert result is not None
    found = study(store, [file], "smoke")
    paths = report(found, judge_study(found), tmp_path)
    page = show(driver, paths[0].as_uri())
    assert "owned" not in page.title
    assert evil in page.execute_script("return document.querySelector('table.sdae caption').textContent")
    find(page, "#runs-text").send_keys(victim.id)
    assert evil in rows(page, "#runs-table")[0]
    assert page.get_log("browser") == []
    if engine := pdf.engine():
        assert pdf.typeset(paths[1], 0, engine).exists()


# With the other files of a sweep


def test_publish_writes_the_report_and_the_claims(store: SyntheticStore, tmp_path: Path) -> None:
    sweep = plan(["table5", "figure4b"], "paper", (0, 1), content=store.fingerprint)
    files = publish(Store(store.root), sweep.artifacts, "paper", (0, 1), tmp_path)
    names = [file.name for file in files]
    assert len(names) == len(set(names))
    assert all(file.stat().st_size for file in files)
    assert {"report.html", "report.tex", "claims.md", "claims.json", "table5.tex", "figure4b.svg"} <= set(names)
    page = (tmp_path / "README.md").read_text()
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (tmp_path / link).exists()
    assert "(report.html)" in page
    assert "SYNTHETIC" in page
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert {claim["verdict"] for claim in claims} <= {"supported", "contradicted", "undecided"}
    assert all(claim["claim"] in (tmp_path / "claims.md").read_text() for claim in claims)
