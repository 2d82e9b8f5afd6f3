"""The server's page in a browser: it shows what the server says, to eyes, keyboards and screen readers, wide and narrow."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")
pytest.importorskip("selenium", reason="selenium is not installed (extra dev)")
import httpx2
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from serving import URL, listening, user

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="there is no Chromium with its driver (apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def http(constant: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with listening(constant, tmp_path_factory.mktemp("sessions"), "--max-tokens", 500) as http:
        yield http


@pytest.fixture(scope="module")
def browser(http: httpx2.Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    browser = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    browser.downloads = downloads
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, http: httpx2.Client, constant: Path) -> Iterator["Page"]:
    page = Page(browser)
    page.resize(1200)
    browser.get(f"{http.base_url}/")
    page.wait(lambda: constant.name in browser.title)
    browser.execute_script(
        "document.getElementById('temperature').value = 0; document.getElementById('max_tokens').value = 30"
    )
    yield page
    assert not page.complaints()
    used = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => new URL(entry.name).host)"
    )
    assert set(used) == {f"{http.base_url.host}:{http.base_url.port}"}


class Page:
    def __init__(self, browser: webdriver.Chrome):
        self.browser = browser

    def complaints(self) -> list[str]:
        """What the console has said since the last call, but for advice."""
        lines = self.browser.get_log("browser")
        return [line["message"] for line in lines if line["level"] in ("WARNING", "SEVERE")]

    def resize(self, width: int, scheme: str = "light") -> None:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wanted = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)

    def wait(self, condition: Any) -> None:
        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition())

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)", selector
        )

    def say(self, text: str, column: int = 0) -> None:
        self.all("textarea")[column].send_keys(text, Keys.ENTER)
        self.wait(lambda: set(self.texts(".send")) == {"Send"})

    def points(self, column: int = 0) -> list[list[int]]:
        return self.browser.execute_script("return conversations[arguments[0]].points", column)


def test_a_conversation_and_its_figures(page: Page, http: httpx2.Client):
    page.say("one two three")
    (answer,) = page.texts(".log .model")
    told = http.post(URL, json=user("one two three", max_tokens=30)).json()
    assert answer == told["choices"][0]["message"]["content"]
    page.say("four")
    assert page.texts(".log .user") == ["one two three", "four"]
    points = page.points()
    tokens = [point[0] for point in points]
    assert len(points) > 20 and tokens == sorted(tokens)
    behind = {"total_tokens": tokens[-1] - 1, "state_bytes": points[-1][1], "completion_tokens": 0}
    # as a slow server tells before it reads on
    page.browser.execute_script("conversations[0].note(arguments[0])", behind)
    assert page.points() == points
    assert {point[1] for point in points} == {told["usage"]["state_bytes"]}  # flat
    about = http.get("/v1/models").json()["data"][0]
    assert about["llama_cache_bytes_per_token"] == 2 * 2 * 32 * 4  # key and value, layers, features, bytes
    assert page.texts(".tokens") == [str(tokens[-1])]
    assert page.texts(".state") == [f"{told['usage']['state_bytes'] / 1000:.3g} kB"]
    assert page.texts(".llama") == [f"{tokens[-1] * 512 / 1000:.3g} kB"]
    assert float(page.texts(".pace")[0].removesuffix(" ms")) > 0
    drawn = page.browser.execute_script(
        "return [...document.querySelectorAll('polyline')].map(line => [...line.points].map(point => point.y))"
    )
    _, llama, state = drawn
    assert llama[0] > llama[-1] + 10  # up is less
    assert max(state) - min(state) == 0


def test_fork_save_and_load(page: Page, http: httpx2.Client):
    page.say("one two three")
    session = page.browser.execute_script("return conversations[0].session")
    page.all(".save")[0].click()
    downloads: Path = page.browser.downloads
    page.wait(lambda: list(downloads.glob("*.safetensors")))
    (saved,) = downloads.glob("*.safetensors")
    assert saved.read_bytes()[8:].startswith(b"{")
    page.all(".fork")[0].click()
    page.wait(lambda: len(page.all("section")) == 2)
    assert not any(button.is_enabled() for button in page.all(".fork"))

    page.say("five", 0)
    page.say("four and more", 1)
    page.say("five", 1)
    lines = page.texts(".log p:not(.note)")
    assert lines[:2] == lines[4:6]
    assert lines[2] == "five" and lines[6] == "four and more"
    assert page.browser.execute_script("return conversations[1].session") != session
    half = page.browser.execute_script("return document.querySelector('section').getBoundingClientRect().width")
    assert 500 < half < 600
    page.all(".close")[1].click()
    page.wait(lambda: len(page.all("section")) == 1)

    page.all("input[type=file]")[0].send_keys(str(saved))
    page.wait(lambda: "Loaded" in page.texts(".log")[0])
    assert "1 answers" in page.texts(".log .note")[0]
    assert page.browser.execute_script("return conversations[0].session") not in (session, None)
    page.say("five")
    assert page.texts(".log .model") == lines[3:4]  # as the conversation that was saved went on


def test_what_fails_is_said_and_leaves_the_conversation(page: Page, http: httpx2.Client):
    page.say("one")
    before = page.points()
    page.browser.execute_script("document.getElementById('max_tokens').value = 501")
    page.say("two")
    assert page.texts(".log .bad") == [
        "max_tokens is 501, here at most 500: the conversation is as it was before this message"
    ]
    assert page.all("textarea")[0].get_property("value") == "two"
    assert page.points() == before
    (complaint,) = page.complaints()
    assert "status of 400" in complaint

    page.browser.execute_script("document.getElementById('max_tokens').value = 500")
    page.all("textarea")[0].clear()
    # The fifth token presses the button: from out here, a busy machine may look only when the answer has ended.
    page.browser.execute_script(
        """const points = conversations[0].points, until = points.length + 5;
        points.push = point => {
            points[points.length] = point;
            if (points.length < until) return;
            delete points.push;
            document.querySelector(".send").click();
        };"""
    )
    page.say("three")
    assert page.texts(".log .bad")[1].startswith("stopped")
    assert page.points() == before


def test_it_can_be_used_without_a_mouse_or_without_eyes(page: Page):
    page.say("one")
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    for role in ("button", "textbox", "image", "log", "region"):
        assert [name for kind, name in named if kind == role] or role == "log"
        assert all(name for kind, name in named if kind in ("button", "textbox", "image", "region")), named
    assert ("textbox", "Message (Enter sends, Shift+Enter breaks the line)") in named
    assert any(role in ("image", "img") and "the state takes" in name for role, name in named)

    page.browser.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        webdriver.ActionChains(page.browser).send_keys(Keys.TAB).perform()
        focused = page.browser.switch_to.active_element
        reached.append(focused.get_attribute("class") or focused.tag_name)
    assert {"summary", "fork", "save", "input", "new", "log", "textarea", "send"} <= set(reached)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400, 320])
def test_wide_and_narrow_light_and_dark(page: Page, width: int, scheme: str):
    """Nothing is cut off, and all text stands out from what is behind it by 4.5 to 1 (WCAG 2.1, 1.4.3)."""
    page.say("one")
    page.resize(width, scheme)
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    ratios = page.browser.execute_script(
        """
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const light = color => {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255);
            const linear = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const behind = element => {
            const color = getComputedStyle(element).backgroundColor;
            return color === "rgba(0, 0, 0, 0)" && element.parentElement ? behind(element.parentElement) : color;
        };
        const shown = [...document.querySelectorAll("body *:not(:disabled)")].filter(element => element.checkVisibility()
            && [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()));
        return shown.map(element => {
            const style = getComputedStyle(element);
            const text = light(element.closest("svg") ? style.fill : style.color), ground = light(behind(element));
            const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
            return [element.className?.baseVal ?? element.className, ratio];
        });
        """
    )
    assert len(ratios) > 15
    assert min(ratio for _, ratio in ratios) >= 4.5, sorted(ratios, key=lambda pair: pair[1])[:5]
    lights = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (lights == "rgb(246, 247, 249)") == (scheme == "light")
