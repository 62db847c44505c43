"""The reports: what is drawn from records and results, the page's text, and the page in a real browser."""

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib", reason="needs matplotlib")

from test_regret import TRIALS, stored

from benchmarks.__main__ import main as benchmarks_main
from benchmarks.points import point
from benchmarks.report import write_report
from benchmarks.results import to_json
from synthetic import FIRST_CALL, HOST, PROBLEMS, PROVENANCE, SLOWNESS, case, copy_us, run_result
from tuner.cli import main as tuner_main
from tuner.regret import PICKERS
from tuner.report.page import page_text
from tuner.report.points import NAMES, Point, by_kind, grid, mean_ratio, providers
from tuner.report.records import point as point_of_record
from tuner.report.regret_maps import TITLES
from tuner.report.sections import MAIN_KIND, section
from tuner.report.style import DARK, PROVIDERS, VARIANTS, short_count, variable
from tuning_db.jsonl import shipped_archs, shipped_records, write_jsonl
from tuning_db.model import ANY_ROWS, Config, Problem, Record, Source
from tuning_db.store import open_for_writing

POINTS = [point(case(problem)) for problem in PROBLEMS]
ORIGIN = str(PROVENANCE)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run, of host times and of first calls."""
    return write_report([run_result(), HOST, FIRST_CALL], tmp_path_factory.mktemp("report"))


def test_a_point_knows_bandwidth_and_ratios() -> None:
    one = POINTS[4]
    assert one.ratio("eager") == pytest.approx(SLOWNESS["eager"])
    assert one.ratio("copy") == pytest.approx(0.97)
    assert one.gbs("copy") == pytest.approx(one.problem.bytes_moved / copy_us(one.problem) / 1e3)
    assert (one.variant, one.param("num_warps"), one.param("block_cols")) == ("whole_row", "8", "")
    assert mean_ratio(POINTS, "compile") == pytest.approx(SLOWNESS["compile"])
    assert mean_ratio(POINTS, "autotune") is None
    assert one.best_other() == ("quack", pytest.approx(SLOWNESS["quack"]))
    assert Point(one.problem, {"tuned": 1.0, "heuristic": 0.9, "copy": 0.8}).best_other() is None


def test_points_are_grouped_by_kind_and_laid_out_by_rows_and_cols() -> None:
    groups = by_kind(POINTS)
    assert next(iter(groups)) == MAIN_KIND
    assert {"bf16 w=fp32", "fp16", "fp32", "bf16 two_stride"} <= set(groups)
    cells = grid(groups[MAIN_KIND], lambda p: p.ratio("liger"))
    assert (1, 4096) in cells
    assert (1, 131072) not in cells  # Liger refuses it
    assert providers(POINTS) == list(SLOWNESS)


def test_every_provider_has_a_name_and_a_colour_that_is_its_own() -> None:
    assert set(SLOWNESS) <= set(NAMES)
    assert set(NAMES) == set(PROVIDERS)
    assert len(set(PROVIDERS.values())) == len(PROVIDERS)
    assert not set(VARIANTS) & set(DARK)  # cells look the same in both modes


@pytest.mark.parametrize(("number", "text"), [(64, "64"), (1024, "1K"), (5120, "5K"), (40000, "40000"), (1 << 20, "1M"), (1536, "1536")])
def test_short_counts(number: int, text: str) -> None:
    assert short_count(number) == text


def test_a_section_has_every_figure_that_is_promised() -> None:
    made = section("s", "A board", ORIGIN, POINTS)
    names = ["bandwidth", "latency", "fraction", "over-eager", "over-compile", "variant", "heuristic"]
    assert [drawing.name for drawing in made.drawings] == [f"s-{name}" for name in names]
    assert [drawing.name for drawing in made.more_drawings] == ["s-fp16-fraction", "s-fp32-fraction"]
    for drawing in (*made.drawings, *made.more_drawings):
        assert drawing.png.startswith(b"\x89PNG")
        assert PROVENANCE.device.name in drawing.svg
        assert "torch 2.11.0+cu130" in drawing.svg
        assert PROVENANCE.made_at[:10] in drawing.svg
    fraction = made.drawings[2].svg
    main = by_kind(POINTS)[MAIN_KIND]
    assert fraction.count(">0.97</text>") == len(main)
    assert ("times as fast as PyTorch eager", "1.60") in made.key_figures
    assert made.table is not None
    assert len(made.table.rows) == len(POINTS)


def test_the_light_colours_of_a_figure_become_variables_and_the_cells_stay() -> None:
    drawn = section("s", "A board", ORIGIN, POINTS).drawings
    for drawing in drawn:
        assert not [light for light in DARK if light in drawing.svg]
        assert variable(next(iter(DARK))) in drawing.svg
    assert VARIANTS[0] in drawn[5].svg


def test_few_points_are_enough() -> None:
    alone = Point(Problem("rmsnorm", "float32", "none", "float32", 1, 64), {"tuned": 2.0, "copy": 1.0})
    made = section("s", "A board", ORIGIN, [alone])
    assert [drawing.name for drawing in made.drawings] == ["s-latency", "s-fraction"]
    assert made.key_figures == (("problems", "1"), ("of copy speed", "0.50"))


def test_a_run_without_ours_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(to_json(run_result(slowness={"eager": 1.0})))
    result = CliRunner().invoke(benchmarks_main, ["report", str(file), "--output", str(tmp_path)])
    assert (result.exit_code, "has no times of `rmsnorm`" in result.stderr) == (2, True)


def test_the_page_is_whole_and_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href|xlink:href)="(?!#)', text)
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text
    assert text.count("<svg") == 12
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert {target for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for target in target if target} <= set(ids)
    pngs = {file.name for file in page.parent.glob("*.png")}
    assert len(pngs) == 12
    for part in ("host", "first-call", "bandwidth"):
        assert any(part in name for name in pngs)


def test_text_from_outside_is_escaped() -> None:
    odd = section("s", "<b>board</b>", "<script>alert(1)</script>", POINTS[:3])
    text = page_text("<i>", [odd])
    assert "<b>board" not in text
    assert "<script>alert" not in text
    assert "<i>" not in text


def records() -> list[Record]:
    return [record for arch in shipped_archs() for record in shipped_records(arch)[1]]


def test_the_copys_time_is_that_of_the_records_fraction() -> None:
    record = next(record for record in records() if record.source is Source.MEASURED and record.torch_us)
    made = point_of_record(record)
    assert made.ratio("copy") == pytest.approx(record.copy_fraction)
    assert made.ratio("eager") == pytest.approx(record.torch_us / record.median_us)
    assert made.config == str(record.config)


def test_the_tuner_draws_what_ships(tmp_path: Path) -> None:
    result = CliRunner().invoke(tuner_main, ["report", "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out' / 'index.html'}\n"
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert f"<h2>{name}</h2>" in text
    drawn = [record for record in records() if record.source is Source.MEASURED and record.problem.rows != ANY_ROWS]
    measured = {(record.device_uid, record.problem) for record in drawn}
    assert text.count("<tr>") == len(measured) + 2


def test_the_users_own_records_come_before_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, shipped = shipped_records("sm_90")
    mine = Record(**{**vars(shipped[0]), "config": Config.of("whole_row", num_warps=31), "source": Source.MEASURED})
    database = tmp_path / "mine.sqlite"
    with open_for_writing(database) as store:
        store.import_jsonl(write_jsonl(devices, [mine]))
    monkeypatch.setenv("RMSNORM_TUNING_DB", str(database))
    assert CliRunner().invoke(tuner_main, ["report", "--output", str(tmp_path / "all")]).exit_code == 0
    assert (tmp_path / "all" / "index.html").read_text().count("num_warps=31") == 1
    assert CliRunner().invoke(tuner_main, ["report", "--db", str(database), "--output", str(tmp_path / "one")]).exit_code == 0
    assert (tmp_path / "one" / "index.html").read_text().count("<tr>") == 2


def test_what_picks_lose_is_drawn_where_there_are_trials(tmp_path: Path) -> None:
    assert set(TITLES) == set(PICKERS)
    path = stored(tmp_path / "a.sqlite", TRIALS)
    result = CliRunner().invoke(tuner_main, ["report", "--db", str(path), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    drawn = {file.stem.partition("-regret-")[2] for file in (tmp_path / "out").glob("*-regret-*.png")}
    assert drawn == set(PICKERS)


def test_without_records_or_a_folder_the_error_is_one_line(tmp_path: Path) -> None:
    nothing = CliRunner().invoke(tuner_main, ["report", "--arch", "gfx942", "--output", str(tmp_path)])
    assert (nothing.exit_code, "no measured record for gfx942" in nothing.stderr) == (1, True)
    (tmp_path / "file").touch()
    blocked = CliRunner().invoke(tuner_main, ["report", "--output", str(tmp_path / "file" / "out")])
    assert (blocked.exit_code, blocked.stderr.startswith("Error: can't write to ")) == (1, True)


@pytest.mark.parametrize("command", ["tuner", "benchmarks"])
def test_without_matplotlib_the_cure_is_named(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.json"
    file.write_text(to_json(HOST))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("tuner.report.", "benchmarks.report"))]:
        monkeypatch.delitem(sys.modules, name)
    arguments = ["report", "--output", str(tmp_path / "out"), *([str(file)] if command == "benchmarks" else [])]
    result = CliRunner().invoke(benchmarks_main if command == "benchmarks" else tuner_main, arguments)
    assert "matplotlib, which is not installed here: `pip install matplotlib`" in result.stderr


# In a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    return found


@pytest.fixture(scope="module", params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def browser(request: pytest.FixtureRequest, chromium: str, page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, at a width and in a colour scheme, with everything that the console said."""
    webdriver = pytest.importorskip("selenium.webdriver")
    width, scheme = request.param
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("quic", "background-networking", "component-update", "sync", "gpu")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        *(f"--disable-{name}" for name in quiet),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page.as_uri())
        driver.scheme, driver.width = scheme, width
        yield driver
    finally:
        driver.quit()


def test_the_page_renders_and_nothing_overflows(browser: Any) -> None:
    assert browser.get_log("browser") == []
    inner, visible = browser.execute_script("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inner == visible <= browser.width
    figures = browser.execute_script(
        "return [...document.querySelectorAll('main > section > .figures svg')].map(s => [s.clientWidth, s.clientHeight])"
    )
    assert len(figures) == 10
    assert all(width > 300 and height > 100 for width, height in figures)
    outside = """
        const main = document.querySelector('main').getBoundingClientRect();
        return [...document.querySelectorAll('figure, .table, dl div, h2, .origin')]
            .filter(e => e.getBoundingClientRect().right > main.right + 0.5).map(e => e.tagName);"""
    assert browser.execute_script(outside) == []
    clipped = "return [...document.querySelectorAll('dl div, nav a')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
    assert browser.execute_script(clipped) == []


def luminance(colour: str) -> float:
    """Relative luminance of a computed `rgb(…)`, as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_is_readable_in_either_scheme(browser: Any) -> None:
    """Contrast of 4.5 (WCAG 2, AA) of page text and of text in figures."""
    ground = luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (ground > 0.5) == (browser.scheme == "light")
    colours = browser.execute_script("""
        const texts = [...document.querySelectorAll('h1, h2, .origin, dt, dd, td, nav a')].map(e => getComputedStyle(e).color);
        const axes = [...document.querySelectorAll('figure svg text')].filter(e => !/^[\\d.]+$/.test(e.textContent));
        return [...new Set([...texts, ...axes.map(e => getComputedStyle(e).fill)])];""")
    for colour in colours:
        brighter, darker = sorted((luminance(colour), ground), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, colour


def column(browser: Any, name: str) -> list[str]:
    script = """
        const table = document.querySelector('table');
        const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === arguments[0]);
        return [...table.tBodies[0].rows].map(r => r.cells[at].textContent);"""
    found: list[str] = browser.execute_script(script, name)
    return found


def test_the_table_sorts(browser: Any) -> None:
    def click(name: str) -> str:
        button = browser.find_element("xpath", f"//th/button[text()='{name}']")
        browser.execute_script("arguments[0].click()", button)
        state: str = browser.execute_script("return arguments[0].parentElement.getAttribute('aria-sort')", button)
        return state

    assert click("µs") == "ascending"
    times = [float(text) for text in column(browser, "µs")]
    assert times == sorted(times)
    assert times[0] < times[-1]
    assert click("µs") == "descending"
    times = [float(text) for text in column(browser, "µs")]
    assert times == sorted(times, reverse=True)
    assert click("kind") == "ascending"
    kinds = column(browser, "kind")
    assert kinds == sorted(kinds)
    assert len(set(kinds)) > 1
    for order in ("ascending", "descending"):  # empty cells, where Liger refuses, stay last
        assert click("× Liger") == order
        cells = column(browser, "× Liger")
        empty = cells.count("")
        assert empty > 0
        assert cells[-empty:] == [""] * empty
