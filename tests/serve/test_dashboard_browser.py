"""The dashboard in headless Chromium, over a real server and a real engine under load.

    .venv/bin/python -m pytest -m browser tests/serve

needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver) and the package selenium. The
screenshots lie in pytest's temporary directory: --basetemp=DIR says where.
"""

import json
import os
import shutil
import threading
import time

import httpx2
import jax
import numpy as np
import pytest
from live_server import free_port, live_server
from serve.support import LIMIT_S, ranks_process, save_model
from starlette.applications import Starlette

import jaxmoe
from jaxmoe.engine import Engine, EngineOptions, SamplingParams
from jaxmoe.serve import dashboard

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
    ),
]

RANKS = 4
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --force-prefers-reduced-motion"
)
SIZES = {"desktop": (1200, 900), "phone": (360, 740)}

# Every text's contrast with the nearest background that is painted, by WCAG's formula; gives the failures.
CONTRAST = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => {
  const [r, g, b] = parse(c).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const painted = (e) => {
  for (; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (parse(color)[3] !== 0) return color;
  }
  return "rgb(255, 255, 255)";
};
const failures = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.getClientRects().length || ["SCRIPT", "STYLE"].includes(e.tagName)) continue;
  const style = getComputedStyle(e);
  const front = light(e instanceof SVGElement ? style.fill : style.color), back = light(painted(e));
  const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  if (ratio < 4.5) failures.push(`${e.tagName} ${e.className} "${e.textContent.slice(0, 30)}" ${ratio.toFixed(2)}`);
}
return failures;
"""


@pytest.fixture(scope="module")
def engine():
    """The tiny preset over four ranks. Compiled before anyone looks."""
    config = jaxmoe.presets["tiny"].replace(num_nextn_predict_layers=0)
    params = jaxmoe.init_params(config, jax.random.key(0))
    mesh = jaxmoe.sharding.make_mesh(expert=RANKS, devices=jax.devices()[:RANKS])
    options = EngineOptions(max_running=4, max_step_tokens=64, max_length=512, pages=40)
    with Engine(params, config, options=options, mesh=mesh) as engine:
        engine.warmup()
        yield engine


@pytest.fixture
def browser(tmp_path):
    """Chromium with an empty profile that logs its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER, log_output=os.devnull)
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture
def load(engine):
    """Requests that come all the time: some prompts begin alike, more than can run at once. Call it to stop."""
    end = threading.Event()

    def work():
        rng = np.random.default_rng(0)
        shared = rng.integers(0, 256, 96).tolist()
        while not end.is_set():
            prompts = [
                shared * int(rng.integers(0, 2))
                + rng.integers(0, 256, rng.integers(5, 120)).tolist()
                for _ in range(24)
            ]
            each = [SamplingParams(max_new_tokens=int(rng.integers(2, 60))) for _ in prompts]
            engine.generate(prompts, each)

    thread = threading.Thread(target=work)
    thread.start()

    def stop():
        end.set()
        thread.join()

    yield stop
    stop()


def app_of(engine):
    return Starlette(routes=dashboard.routes(engine))


def value(browser, element_id):
    """The number behind a figure."""
    element = browser.find_element("id", element_id)
    return float(element.get_attribute("data-value") or "nan")


def text(browser, element_id):
    return browser.find_element("id", element_id).text


def wait_until(condition, limit_s=30):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def emulate(browser, size, scheme):
    """Sets the window's size, and light or dark."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    time.sleep(0.3)


def screenshot(browser, path, size):
    """The whole page, not only what the window shows."""
    width, _ = SIZES[size]
    height = browser.execute_script("return document.documentElement.scrollHeight")
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.2)
    assert browser.save_screenshot(str(path))


def check_layout(browser, size):
    """No horizontal scroll, nothing cut off, and every text readable on its background."""
    inner, scroll, client = browser.execute_script(
        "const e = document.documentElement; return [innerWidth, e.scrollWidth, e.clientWidth]"
    )
    assert inner == SIZES[size][0] and scroll == client
    cut = browser.execute_script(
        "return [...document.querySelectorAll('section')].filter((e) => e.scrollWidth > e.clientWidth)"
        ".map((e) => e.querySelector('h2').textContent)"
    )
    assert cut == []
    assert browser.execute_script(CONTRAST) == []


def requests_of(browser):
    """Addresses that were asked for, but for the browser's own first page."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    addresses = {e["request"]["url"] for e in sent}
    return {a for a in addresses if not a.startswith(("data:", "chrome:"))}


def console_of(browser):
    """Warnings and errors of the console."""
    return [e for e in browser.get_log("browser") if e["level"] not in ("DEBUG", "INFO")]


def test_figures_move_under_load_and_agree_with_the_engine(engine, browser, load, tmp_path):
    with live_server(app_of(engine)) as url:
        browser.get(url)
        wait_until(lambda: text(browser, "status") == "Live")
        wait_until(lambda: value(browser, "rate-output") > 0)
        seen = value(browser, "total-generated")
        wait_until(lambda: value(browser, "total-generated") > seen)
        wait_until(lambda: value(browser, "running") > 0 and value(browser, "waiting") > 0)
        time.sleep(8)  # for a timeline worth looking at
        for size in SIZES:
            for scheme in ("light", "dark"):
                emulate(browser, size, scheme)
                check_layout(browser, size)
                screenshot(browser, tmp_path / f"{size}-{scheme}.png", size)
        load()
        stats = engine.stats()
        assert stats.running == stats.waiting == 0
        wait_until(lambda: value(browser, "total-generated") == stats.generated_tokens)
        wait_until(lambda: value(browser, "rate-output") == 0)
        check_totals(browser, engine.stats())
        assert console_of(browser) == []
        assert requests_of(browser) == {f"{url}/", f"{url}/events"}
    print(f"screenshots: {tmp_path}")


def check_totals(browser, stats):
    """Every counter on the page is the engine's."""
    assert value(browser, "total-prompt") == stats.prompt_tokens
    assert value(browser, "reused") == stats.cached_tokens
    assert value(browser, "steps") == stats.steps
    assert value(browser, "preemptions") == stats.preemptions
    assert value(browser, "running") == value(browser, "waiting") == 0
    assert value(browser, "pages-held") == stats.pages_held
    assert value(browser, "pages-idle") == stats.pages_idle
    finished = {
        row.get_attribute("data-reason"): int(row.get_attribute("data-value"))
        for row in browser.find_elements("css selector", "#finished dd")
    }
    assert finished == {reason: n for reason, n in stats.finished.items() if n}
    total = stats.expert_load.sum(0)
    rows = browser.find_elements("css selector", "#heat .rank")
    assert len(rows) == stats.ranks == RANKS
    for row, experts in zip(rows, stats.rank_experts, strict=True):
        buttons = row.find_elements("css selector", "button")
        assert [b.find_element("css selector", "b").text for b in buttons] == list(
            map(str, experts)
        )
        buttons[0].click()
        assert f"{total[experts[0]]:,} token visits" in text(browser, "expert-detail")
    for name in ("ttft", "tpot"):
        cells = browser.find_elements("css selector", f"#{name} td")
        quantiles = [float(cell.get_attribute("data-value")) for cell in cells]
        assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]


def test_an_idle_engine_is_shown_as_idle(browser, tmp_path):
    """No figure is made up where nothing was measured."""
    config = jaxmoe.presets["tiny"].replace(num_nextn_predict_layers=0)
    params = jaxmoe.init_params(config, jax.random.key(0))
    with (
        Engine(params, config, options=EngineOptions(pages=256)) as engine,
        live_server(app_of(engine)) as url,
    ):
        browser.get(url)
        wait_until(lambda: text(browser, "status") == "Live")
        wait_until(lambda: value(browser, "rate-output") == 0)
        for size in SIZES:
            emulate(browser, size, "light")
            check_layout(browser, size)
            screenshot(browser, tmp_path / f"idle-{size}.png", size)
        assert "No token has reached an expert yet" in text(browser, "load-note")
        assert "No token came out in the last" in text(browser, "latency-note")
        assert {cell.text for cell in browser.find_elements("css selector", "td + td")} == {"–"}
        assert "Nothing in the last" in text(browser, "chart-rate")
        assert not browser.find_element("id", "ranks-panel").is_displayed()
        assert console_of(browser) == []


def test_the_page_says_that_the_server_is_away_and_that_it_restarted(engine, browser, tmp_path):
    port = free_port()
    with live_server(app_of(engine), port) as url:
        browser.get(url)
        wait_until(lambda: text(browser, "status") == "Live")
    wait_until(lambda: "trying again" in text(browser, "status"))
    assert "Figures are from" in text(browser, "status")
    emulate(browser, "phone", "dark")
    check_layout(browser, "phone")
    screenshot(browser, tmp_path / "lost-phone.png", "phone")
    with live_server(app_of(engine), port):
        wait_until(lambda: text(browser, "status") == "Live")
        assert "The server restarted at" in text(browser, "notice")
        check_layout(browser, "phone")
        screenshot(browser, tmp_path / "restarted-phone.png", "phone")


def states(browser):
    return [e.text for e in browser.find_elements("css selector", "#ranks .state")]


def test_a_rank_that_dies_and_returns_is_seen_without_reloading(browser, tmp_path):
    """Before, during and after: rank processes behind a real server."""
    save_model(tmp_path)
    with ranks_process(tmp_path) as (_, url):
        browser.get(url)
        wait_until(lambda: states(browser) == ["active"] * 3)
        assert text(browser, "ranks-active") == "3" and value(browser, "min-copies") >= 2
        for size in SIZES:
            emulate(browser, size, "light")
            check_layout(browser, size)
            screenshot(browser, tmp_path / f"ranks-before-{size}.png", size)
        killed = httpx2.post(f"{url}/ranks/1/kill", json={}).json()
        wait_until(lambda: states(browser)[1] == "starting")
        assert value(browser, "ranks-epoch") >= killed["epoch"]
        event = browser.find_element("css selector", "#events li[data-type=lost]")
        assert "Rank 1 lost" in event.text
        shown = {e.get_attribute("data-phase") for e in event.find_elements("css selector", "dd")}
        (lost,) = [event for event in killed["events"] if event["type"] == "lost"]
        assert shown - {None} == set(lost["phases"])
        for size in SIZES:
            emulate(browser, size, "dark")
            check_layout(browser, size)
            screenshot(browser, tmp_path / f"ranks-during-{size}.png", size)
        for rank in (0, 2):  # nothing is left that holds all experts
            httpx2.post(f"{url}/ranks/{rank}/kill", json={})
        wait_until(lambda: text(browser, "refusal").startswith("Nothing is served: "))
        assert "nothing is served" in text(browser, "status")
        check_layout(browser, "phone")
        screenshot(browser, tmp_path / "ranks-lost-phone.png", "phone")
        wait_until(lambda: states(browser) == ["active"] * 3, limit_s=LIMIT_S)
        wait_until(lambda: not browser.find_element("id", "refusal").is_displayed())
        assert text(browser, "status") == "Live"
        emulate(browser, "desktop", "light")
        check_layout(browser, "desktop")
        screenshot(browser, tmp_path / "ranks-after-desktop.png", "desktop")
        assert console_of(browser) == []
    print(f"screenshots: {tmp_path}")
