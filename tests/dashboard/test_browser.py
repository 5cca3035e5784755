"""The page in a real browser: Debian's Chromium, headless, driven through Playwright; skipped where it is missing."""

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from steerscale.cli import main
from steerscale.dashboard.runs import find_directories
from steerscale.dashboard.serve import LiveRuns, make_server
from steerscale.metrics import Recorder
from tests.dashboard.test_outputs import HOSTILE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with sync_playwright() as playwright:
        # Root needs no sandbox of its own: it opens nothing but files that these tests wrote.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 24 runs, one with a name that tries to get out of it, and a broken one."""
    directory = tmp_path_factory.mktemp("report")
    shutil.copytree(runs, directory / "runs")
    run = directory / "runs" / "hostile"
    shutil.copytree(find_directories([runs])[0], run)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "name": HOSTILE, "tags": ["a b", "c"]}), encoding="utf-8"
    )
    (directory / "runs" / "broken").mkdir()
    (directory / "runs" / "broken" / "config.yaml").write_text("a: [", encoding="utf-8")
    assert main(["dashboard", str(directory / "runs"), "-o", str(directory / "report.html")]) == 0
    return directory / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, opened. Afterwards: no errors, no requests."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    troubles = watch(page, allowed=("file:", "data:", "blob:"))
    page.goto(report.as_uri())
    expect(page.locator("#summary")).to_contain_text("25 of 25 runs")
    yield page
    page.close()
    assert troubles == []


def watch(page: Page, *, allowed: tuple[str, ...]) -> list[str]:
    """Errors, console messages and requests elsewhere, as they come."""
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(allowed) else troubles.append(request.url))
    return troubles


def rows(page: Page) -> Locator:
    """Rows of the table of runs."""
    return page.locator("#runs tbody tr")


def column(page: Page, title: str) -> list[str]:
    """Texts of a column."""
    heads = page.locator("#runs thead th").all_inner_texts()
    (index,) = [k for k, head in enumerate(heads) if re.sub(r" [↑↓]|×", "", head).strip() == title]
    return page.locator(f"#runs tbody td:nth-child({index + 1})").all_inner_texts()


def filter_by(page: Page, text: str) -> list[str]:
    """Type a filter; layouts of the runs that are left."""
    page.fill("#filter", text)
    page.wait_for_timeout(300)  # the page waits for the end of typing
    return column(page, "layout")


def test_filters_find_runs_by_configuration_figures_and_text(page: Page) -> None:
    everything = column(page, "layout")
    two = filter_by(page, "parallel.tensor=2")
    assert two == [layout for layout in everything if layout.startswith("TP2")]
    assert filter_by(page, "tensor=2") == two, "the end of a key is enough"
    assert len(filter_by(page, "parallel.tensor!=2")) == 25 - len(two)
    wide = filter_by(page, "model.d_model>=2048 mbs<=2")
    assert wide
    assert all("MBS4" not in layout for layout in wide)
    assert filter_by(page, 'recompute=none device~"h100 80gb"')
    assert set(column(page, "state")) <= {"finished", "failed"}
    filter_by(page, "gpt_6.7b")
    assert all("gpt_6.7b" in name for name in column(page, "run"))
    shown = filter_by(page, "mfu>=40%")
    assert 0 < len(shown) < 25
    assert all(float(value.rstrip("%")) >= 40 for value in column(page, "MFU"))
    page.click("#clear")
    expect(rows(page)).to_have_count(25)


def test_wrong_filter_says_what_would_be_right_and_keeps_the_table(page: Page) -> None:
    page.fill("#filter", "parallel.tenso=2")
    expect(page.locator("#filter-error")).to_contain_text("did you mean")
    expect(page.locator("#filter-error")).to_contain_text("parallel.tensor")
    expect(rows(page)).to_have_count(25)
    page.fill("#filter", "interval=10")
    expect(page.locator("#filter-error")).to_contain_text("checkpoint.interval, metrics.interval")
    page.fill("#filter", "")
    expect(page.locator("#filter-error")).to_be_empty()


def test_sorting_by_figures_both_ways_with_unknown_values_last(page: Page) -> None:
    head = page.locator("#runs thead button", has_text="MFU")
    head.click()
    values = column(page, "MFU")
    known = [float(value.rstrip("%")) for value in values if value != "unknown"]
    assert known == sorted(known, reverse=True)
    assert "unknown" in values
    assert values[len(known) :] == ["unknown"] * (25 - len(known))
    expect(page.locator("#runs thead th[aria-sort=descending]")).to_have_text("MFU ↓")
    page.keyboard.press("Enter")  # the button kept the focus
    values = column(page, "MFU")
    assert [float(value.rstrip("%")) for value in values[: len(known)]] == sorted(known)
    assert values[len(known) :] == ["unknown"] * (25 - len(known))


def test_columns_of_any_configuration_key(page: Page) -> None:
    page.select_option("#column", "engine.recompute")
    assert set(column(page, "engine.recompute")) == {"none", "selective", "full"}
    page.locator("#runs thead button", has_text="engine.recompute").first.click()
    assert column(page, "engine.recompute") == sorted(column(page, "engine.recompute"))
    page.click("[aria-label='remove column engine.recompute']")
    expect(page.locator("#runs thead")).not_to_contain_text("engine.recompute")


def test_comparison_shows_figures_against_the_first_and_what_differs(page: Page) -> None:
    expect(page.locator("#compare-section")).to_be_hidden()
    for name in ("tp1", "tp2"):
        page.fill("#filter", f"350m_{name}")
        expect(rows(page).first).to_contain_text(name)
        page.locator("#runs tbody input").first.focus()
        page.keyboard.press("Space")
    expect(page.locator("#compare-title")).to_have_text("Comparison of 2 runs")
    assert page.locator("#compare [data-key='parallel.tensor'] td").all_inner_texts() == ["1", "2"]
    expect(page.locator("#compare [data-key='model.seq_len']")).to_have_count(0)
    expect(page.locator("#compare [data-key=tokens_per_second_per_gpu] .change")).to_contain_text("%")
    page.check("#all-keys")
    assert page.locator("#compare [data-key='model.seq_len'] td").all_inner_texts() == ["2048", "2048"]
    expect(page.locator("#legend li")).to_have_count(2)
    page.click("#select-none")
    expect(page.locator("#compare-section")).to_be_hidden()


def test_heat_map_cells_filter_and_show_the_chosen_figure(page: Page) -> None:
    page.select_option("#heat-metric", "mfu")
    cells = page.locator(".heat[data-axes='mbs gas'] button")
    cell = cells.filter(has_text="%").first
    shown = cell.inner_text()
    place = cell.get_attribute("title") or ""
    cell.focus()
    page.keyboard.press("Enter")
    mbs, gas = re.findall(r"=(\d+)", page.input_value("#filter"))
    assert place.startswith(f"mbs={mbs}, gas={gas}: ")
    layouts = column(page, "layout")
    assert layouts
    assert all(f"MBS{mbs} GAS{gas}" in layout for layout in layouts)
    best = max(float(value.rstrip("%")) for value in column(page, "MFU") if value != "unknown")
    assert shown.startswith(f"{best}%")
    pressed = page.locator(".heat[data-axes='mbs gas'] button[aria-pressed=true]")
    expect(pressed).to_be_focused()
    page.keyboard.press("Enter")
    expect(rows(page)).to_have_count(25)
    page.select_option("#heat-x", "engine.recompute")
    expect(page.locator(".heat[data-axes='engine.recompute tp'] thead")).to_contain_text("selective")
    page.select_option("#heat-x", "tags")  # a list, written with quotes and blanks
    page.locator(".heat[data-axes='tags tp'] button").click()
    expect(rows(page)).to_have_count(1)
    expect(page.locator(".heat[data-axes='tags tp'] button[aria-pressed=true]")).to_have_count(1)


def test_engines_are_told_apart_everywhere(browser: Browser, engines: Path, tmp_path: Path) -> None:
    assert main(["dashboard", str(engines), "-o", str(tmp_path / "report.html")]) == 0
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    troubles = watch(page, allowed=("file:", "data:", "blob:"))
    page.goto((tmp_path / "report.html").as_uri())
    assert sorted(column(page, "engine")) == ["DeepSpeed ZeRO-1", "Megatron-Core"]
    # Cells and colours are by engine, unasked; a click on a cell filters by it, and takes that back.
    cell = page.locator(".heat[data-axes='engine tp'] button").first
    cell.click()
    assert page.input_value("#filter") == 'engine="DeepSpeed ZeRO-1" tp=1'
    assert column(page, "engine") == ["DeepSpeed ZeRO-1"]
    page.locator(".heat[data-axes='engine tp'] button[aria-pressed=true]").click()
    assert page.input_value("#filter") == ""
    page.locator("#scatter").scroll_into_view_if_needed()
    assert sorted(page.locator("#scatter .entry").all_inner_texts()) == ["DeepSpeed ZeRO-1", "Megatron-Core"]
    page.click("#select-all")
    assert len(page.locator("#compare [data-key=engine] td").all_inner_texts()) == 2
    page.close()
    assert troubles == []


def test_every_plot_is_drawn_when_it_is_looked_at(page: Page) -> None:
    titles = page.locator("#charts figcaption, #scatter figcaption, #memory figcaption").all_inner_texts()
    wanted = ("loss", "Tokens", "TFLOP", "MFU", "Seconds", "memory", "bubble", "Restarts", "GAS", "predicted")
    assert len(titles) == len(wanted)
    for title, word in zip(titles, wanted):
        assert word in title
    page.check("#log")
    page.select_option("#x", "time")
    for figure in page.locator("#charts figure, #scatter, #memory").all():
        figure.scroll_into_view_if_needed()
        expect(figure.locator(".main-svg, .empty").first).to_be_attached()
    expect(page.locator("#charts figure").first.locator(".xtitle")).to_have_text("hours since the start")
    expect(page.locator("#formulas")).to_contain_text("model_tflops_per_gpu")
    expect(page.locator("#peaks")).to_contain_text("unknown: no MFU")


def test_names_are_text_everywhere(page: Page) -> None:
    page.fill("#filter", "onerror")
    expect(rows(page)).to_have_count(1)
    assert page.locator("#runs tbody td").nth(1).inner_text().startswith("</script><script>alert(1)")
    page.click("#select-all")
    page.locator("#charts figure").first.locator(".main-svg").first.wait_for(state="attached")
    page.locator("#charts figure").last.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    assert page.locator("img").count() == 0
    expect(page.locator("#broken")).to_contain_text("cannot be read as YAML")


def test_address_keeps_the_view(page: Page) -> None:
    page.fill("#filter", "parallel.tensor=2")
    page.locator("#runs thead button", has_text="tok/s/GPU").click()
    page.locator("#runs tbody input").first.check()
    before = column(page, "run")
    page.reload()
    expect(page.locator("#summary")).to_contain_text("1 selected")
    assert page.input_value("#filter") == "parallel.tensor=2"
    assert column(page, "run") == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_system_in_light_and_dark(browser: Browser, report: Path, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(report.as_uri())
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
    assert light > 200 if scheme == "light" else light < 50
    page.close()


def test_live_page_shows_news_by_itself(browser: Browser, runs: Path, tmp_path: Path) -> None:
    run = find_directories([runs])[0]
    shutil.copytree(run, tmp_path / "run")
    with make_server(LiveRuns([tmp_path]), port=0, refresh_s=0.2) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}/"
            page = browser.new_page()
            troubles = watch(page, allowed=(address, "data:", "blob:"))
            page.goto(address)
            expect(page.locator("#summary")).to_contain_text("1 of 1 runs")
            page.locator("#runs tbody input").check()
            recorder = Recorder(tmp_path / "run", writes=True, tensorboard=False, step=600)
            recorder.write("train", 610, {"loss": 1.25})
            recorder.close()
            expect(rows(page)).to_contain_text("1.250")
            expect(page.locator("#runs tbody input")).to_be_checked()
            shutil.copytree(run, tmp_path / "second")
            expect(page.locator("#summary")).to_contain_text("2 of 2 runs, 1 selected")
            page.close()
        finally:
            server.shutdown()
            thread.join()
    assert troubles == []
