"""The report page in a real browser: it draws, follows the keyboard, and asks no one."""

import json
import shutil
import tempfile

import numpy as np
import pytest

from adapters_fixtures import bert_pairs, lotr, write_lora
from lotrtensor.report.tables import size

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs the packages chromium and chromium-driver"
)
pytest.importorskip("plotly")
selenium = pytest.importorskip("selenium.webdriver")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)
EVIL = "<svg onload=alert(1)>&amp;</script>"
PLOTS = (
    *("rate", "groups", "heat", "energy", "spectrum-left", "spectrum-right", "layers-left"),
    *("layers-right", "kinds-left", "kinds-right", "similarity"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of two adapters, and the document that ``--json`` prints."""
    folder = tmp_path_factory.mktemp("page")
    pairs = {n.replace("intermediate", EVIL): pair for n, pair in bert_pairs(6, 3).items()}
    one = write_lora(folder / "<b>one", pairs)
    two = write_lora(folder / "two", bert_pairs(6, 3, 1))
    done = lotr("analyze", one, two, "-o", folder / "report.html", "--json")
    assert done.code == 0, done.err
    return folder / "report.html", json.loads(done.out)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium with a profile of its own, which logs its console and its requests."""
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = selenium.Chrome(
            options=options, service=selenium.ChromeService(executable_path=DRIVER)
        )
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture
def opened(browser, report):
    """The page, drawn, in a wide light window; nothing may have been logged when a test ends."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    emulate(browser, scheme="light")
    browser.set_window_size(1280, 1000)
    browser.get(report[0].as_uri())
    wait_until(browser, "return document.documentElement.dataset.ready === 'true'")
    yield browser
    assert browser.get_log("browser") == []


def wait_until(browser, script, seconds=60):
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda driver: driver.execute_script(script))


def emulate(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def element(browser, name):
    return browser.find_element("id", name)


def text(browser, name):
    return element(browser, name).text


def press(browser, name, *keys):
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        element(browser, name).send_keys(getattr(Keys, key))


def settled(browser):
    """Wait for the frame in which the pictures follow the slider."""
    browser.execute_async_script(
        "const done = arguments[0];requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def shown(error):
    """An error as the page writes it."""
    if error is None:
        return "–"
    if error and error < 0.001:
        digits, exponent = f"{error:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    return f"{error:.3f}"


FAMILY = {"compressed": ("lotr", "lora"), "lotr": ("compressed", "terms", "shared", "lora")}
"""How the kinds begin that a form is compared with."""


def assert_shows(browser, adapter, step, mode):
    """Every number beside the slider and every group's row is the document's."""
    mode = mode if step[mode] else next(form for form in ("compressed", "lotr") if step[form])
    point = step[mode]
    assert text(browser, "size-value") == size(step["bytes"])
    assert text(browser, "n-bytes") == size(point["bytes"])
    assert text(browser, "n-error") == shown(point["relative_error"])
    assert text(browser, "n-bound") == shown(point["lower_bound"])
    others = [e for kind, e in step["alternatives"].items() if kind.startswith(FAMILY[mode])]
    assert text(browser, "n-other") == shown(min(others, default=None))
    rows = browser.find_elements("css selector", "#groups-table tbody tr")
    assert len(rows) == len(adapter["groups"]) + 1
    for row, group, at in zip(rows, adapter["groups"], point["groups"], strict=False):
        cells = [cell.text for cell in row.find_elements("css selector", "th, td")]
        assert cells[0] == group["name"]
        assert cells[2:5] == [
            f"{at['p']}, {at['q']}" if at["p"] else "–",
            f"{at['terms']:,}" if mode == "compressed" else "–",
            size(at["bytes"]),
        ]
        assert cells[6] == shown(at["relative_error"])


def test_the_page_opens_from_disk_and_draws_every_figure(opened, report):
    for name in PLOTS:
        assert opened.execute_script(
            "const box = document.getElementById(arguments[0]);"
            "return box.querySelectorAll('svg.main-svg').length > 0 && box.clientWidth > 200",
            name,
        ), name
        assert element(opened, name).get_attribute("aria-label")
    adapter = report[1]["adapters"][0]
    advice = adapter["recommendation"]
    assert text(opened, "recommendation") == advice[0].upper() + advice[1:] + "."


def test_no_request_leaves_the_page(opened, report):
    """What the browser asks for is the file and what is inside it."""
    opened.get_log("performance")
    opened.refresh()
    wait_until(opened, "return document.documentElement.dataset.ready === 'true'")
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    addresses = {request["request"]["url"] for request in asked}
    assert report[0].as_uri() in addresses
    assert all(a == report[0].as_uri() or a.startswith(("data:", "blob:")) for a in addresses)


def test_the_slider_follows_the_keyboard(opened, report):
    """From end to end; numbers, table and pictures are the document's at every stop."""
    adapter = report[1]["adapters"][0]
    steps = adapter["steps"]
    press(opened, "size", "HOME")
    for i, step in enumerate(steps):
        settled(opened)
        assert_shows(opened, adapter, step, "compressed")
        assert size(step["bytes"]) in element(opened, "size").get_attribute("aria-valuetext")
        if i + 1 < len(steps):
            press(opened, "size", "ARROW_RIGHT")
    found = opened.execute_script(
        "const data = document.getElementById('heat').data[0];"
        "const dot = document.getElementById('rate').data.find((t) => t.name === 'chosen size');"
        "return [data.z, dot.x[0], dot.y[0]]"
    )
    last = steps[-1]["compressed"]
    assert found[0] == [group["module_errors"] for group in last["groups"]]
    share = 100 * last["bytes"] / adapter["source_bytes"]
    assert found[1:] == [pytest.approx(share), last["relative_error"]]
    press(opened, "size", "HOME", "END")
    settled(opened)
    assert_shows(opened, adapter, steps[-1], "compressed")


def test_the_same_bytes_can_go_to_shared_factors(opened, report):
    """The radio button works from the keyboard, and the command says how."""
    adapter = report[1]["adapters"][0]
    press(opened, "size", "END", "ARROW_LEFT")
    button = opened.find_element("css selector", 'input[name="mode"][value="compressed"]')
    from selenium.webdriver.common.keys import Keys

    button.send_keys(Keys.ARROW_DOWN)
    settled(opened)
    step = adapter["steps"][-2]
    assert_shows(opened, adapter, step, "lotr")
    assert "lotr convert" in text(opened, "sentence")
    assert f"--budget {step['lotr']['bytes']}" in text(opened, "sentence")


def test_another_adapter_can_be_chosen(opened, report):
    """All of the page is about it then."""
    second = report[1]["adapters"][1]
    opened.find_element("css selector", '#adapters input[value="1"]').click()
    assert text(opened, "title") == second["name"]
    index = int(element(opened, "size").get_attribute("value"))
    assert_shows(opened, second, second["steps"][index], "compressed")
    z = opened.execute_script("return document.getElementById('similarity').data[0].z")
    assert z == report[1]["similarity"]["cosine"]


def test_names_from_files_are_shown_as_they_are(opened, report):
    """In tables and in pictures; nothing of them runs."""
    assert text(opened, "title") == report[1]["adapters"][0]["name"]
    legend = opened.find_elements("css selector", "#groups .legendtext")
    assert any(EVIL in entry.text for entry in legend)
    assert not opened.find_elements("css selector", "svg[onload], img, table b, h1 b")


def test_tables_open_beside_the_pictures(opened, report):
    """Each from the keyboard, with as many rows as there are things."""
    from selenium.webdriver.common.keys import Keys

    adapter = report[1]["adapters"][0]
    rows = {
        "rate-table": len({choice["budget"] for choice in adapter["choices"]}),
        "heat-table": len(adapter["groups"]),
        "energy-table": 6,
        "spectrum-table": len(adapter["groups"]),
        "layers-table": 12,
        "kinds-table": 2 * len(adapter["groups"]),
        "rates-table": sum(len(group["rates"]["p"]) for group in adapter["groups"]),
        "similarity-table": 2,
    }
    for name, count in rows.items():
        box = opened.execute_script(
            "return document.getElementById(arguments[0]).closest('details')", name
        )
        box.find_element("css selector", "summary").send_keys(Keys.ENTER)
        wait_until(opened, f"return document.querySelector('#{name} table') !== null")
        found = opened.find_elements("css selector", f"#{name} tbody tr")
        assert len(found) == count, name


def luminance(browser, script):
    """Relative luminance of a CSS color, as WCAG defines it."""
    channels = browser.execute_script(
        "const c = document.createElement('canvas').getContext('2d', {colorSpace: 'srgb'});"
        f"c.fillStyle = ({script}); c.fillRect(0, 0, 1, 1);"
        "return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)"
    )
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (c / 255 for c in channels)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(browser, first, second):
    dark, light = sorted((luminance(browser, first), luminance(browser, second)))
    return (light + 0.05) / (dark + 0.05)


CARD = "getComputedStyle(document.querySelector('.hero')).backgroundColor"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_in_light_and_dark(opened, scheme):
    """Contrast of at least 4.5 for text and 3 for curves (WCAG 2.2); pictures change with it."""
    emulate(opened, scheme)
    settled(opened)
    assert (luminance(opened, CARD) > 0.5) == (scheme == "light")
    for selector in (".hero p.lead", ".note", ".facts", "#targets td", "#targets .best", "code"):
        node = f"getComputedStyle(document.querySelector('{selector}')).color"
        assert contrast(opened, node, CARD) >= 4.5, selector
    tick = "getComputedStyle(document.querySelector('#rate .xtick text')).fill"
    assert contrast(opened, tick, CARD) >= 4.5
    lines = opened.execute_script(
        "return document.getElementById('rate').data.map((t) => t.line && t.line.color)"
        ".filter(Boolean)"
    )
    assert len(set(lines)) >= 4
    for line in lines:
        assert contrast(opened, json.dumps(line), CARD) >= 3, line


def test_a_narrow_window_has_no_sideways_scroll(opened):
    """A telephone's; only tables scroll within their boxes."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened.refresh()
    wait_until(opened, "return document.documentElement.dataset.ready === 'true'")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390
    assert opened.execute_script("return document.getElementById('rate').clientWidth") <= 390


def test_paper_is_light_and_holds_the_pictures(opened):
    """Even from a dark screen; the page comes back as it was."""
    emulate(opened, "dark")
    settled(opened)
    opened.execute_script(
        "window.seen = null; addEventListener('beforeprint', () => { seen = {"
        "card: getComputedStyle(document.querySelector('.hero')).backgroundColor,"
        "widths: [...document.querySelectorAll('.plot')].map((p) => p._fullLayout.width),"
        "dark: document.documentElement.hasAttribute('data-printing')}; })"
    )
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 50_000
    seen = opened.execute_script("return window.seen")
    assert seen["card"] == "rgb(255, 255, 255)"
    assert max(seen["widths"]) <= 700
    wait_until(opened, "return !document.documentElement.hasAttribute('data-printing')")
    assert luminance(opened, CARD) < 0.5


def test_an_adapter_smaller_than_every_form_is_drawn(browser, tmp_path):
    """One module of rank 1: the only stop is a LoTR larger than it."""
    pair = (np.ones((4, 1), np.float32), np.ones((1, 3), np.float32))
    one = write_lora(tmp_path / "one", {"a.0.q": pair})
    assert lotr("analyze", one, "-o", tmp_path / "report.html").code == 0
    browser.get((tmp_path / "report.html").as_uri())
    wait_until(browser, "return document.documentElement.dataset.ready === 'true'")
    assert text(browser, "n-bytes") == size(32)
    assert browser.get_log("browser") == []
