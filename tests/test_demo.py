"""`clip-lite demo`: its page in a browser, what its server refuses, and the numbers it shows."""

import asyncio
import io
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import open_browser
from conftest import draw
from nicegui import Client, ui
from PIL import Image
from scipy.special import softmax

import clip_lite_jax
from clip_lite_jax import cli
from clip_lite_jax.apps import demo, demo_engine, demo_guard, demo_views
from clip_lite_jax.apps.demo_engine import MAX_BYTES, Engine, Wanted
from clip_lite_jax.apps.demo_tabs import ClassifyTab, ScoreTab
from clip_lite_jax.apps.index import Index
from clip_lite_jax.apps.index_build import Options, build_index
from clip_lite_jax.config import DataConfig, NegativesConfig
from clip_lite_jax.errors import BadImage, ConfigError, DataError
from clip_lite_jax.inference import DualEncoderModel

HOSTILE = "<img src=x onerror=alert(1)> {self.__class__} <b>bold</b>"


@pytest.fixture(scope="module")
def model(finished_run: Path) -> DualEncoderModel:
    return clip_lite_jax.load(finished_run, batch_size=16)


@pytest.fixture(scope="module")
def engine(
    model: DualEncoderModel,
    finished_run: Path,
    pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    """With an index of the 48 pictures and their captions."""
    folder = tmp_path_factory.mktemp("demo") / "index"
    build_index(model, DataConfig(source=str(pairs)), folder, Options("both"), str(finished_run))
    return Engine(model, "runs/tiny", Index.open(folder))


@dataclass
class Served:
    url: str
    port: int


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    """The server, in a thread; NiceGUI knows one in a process."""
    listening = demo.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = demo.build_server(engine, "127.0.0.1")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    yield Served(demo.address("127.0.0.1", port), port)
    server.should_exit = True
    thread.join(20)


@dataclass
class Opened:
    page: Any
    requested: list[str]
    wrong: list[str]


@pytest.fixture(scope="module")
def opened(served: Served) -> Iterator[Opened]:
    """The page in a browser, with all that it asked for and what it complained of."""
    with open_browser() as browser:
        page = browser.new_page(color_scheme="dark", viewport={"width": 390, "height": 844})
        page.set_default_timeout(20_000)
        found = Opened(page, [], [])
        page.on("request", lambda request: found.requested.append(request.url))
        page.on("websocket", lambda socket: found.requested.append(socket.url))
        page.on("pageerror", lambda error: found.wrong.append(str(error)))
        page.on("dialog", lambda dialog: found.wrong.append(f"dialog: {dialog.message}"))
        page.goto(served.url)
        page.get_by_label("Text", exact=True).wait_for()
        yield found


def tab(page: Any, name: str, label: str) -> None:
    page.get_by_role("tab", name=name).click()
    page.get_by_label(label).first.wait_for()


def upload(page: Any, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.locator("input[type=file]").first.set_input_files(file)


def png(shape: str, colour: str) -> bytes:
    buffer = io.BytesIO()
    draw(shape, colour).save(buffer, "PNG")
    return buffer.getvalue()


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_text_contents()]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_search_by_text_then_by_a_hit_with_the_keyboard(
    opened: Opened, model: DualEncoderModel, pairs: Path
) -> None:
    page = opened.page
    page.get_by_label("Text", exact=True).fill("a red circle")
    page.get_by_label("Text", exact=True).press("Enter")
    page.locator(".demo-hit").first.wait_for()
    assert page.get_by_text("The best 12 of 48, with the critic's T in nats.").is_visible()
    pictures = sorted(pairs.parent.glob("*.png"))
    scores = np.sort(model.score(pictures, ["a red circle"] * 48))[::-1][:12]
    shown = [number(text) for text in texts(page, ".demo-hit .demo-number")]
    np.testing.assert_allclose(shown, scores, atol=0.0051)
    assert all(url.startswith("data:image/jpeg") for url in sources(page, ".demo-hit img"))
    assert page.evaluate("document.body.classList.contains('body--dark')")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing is wider than a phone

    page.locator(".demo-hit").first.focus()
    page.keyboard.press("Enter")
    page.locator(".demo-card").get_by_role("status").get_by_text("a red circle").wait_for()
    page.get_by_role("button", name="Search by it").press("Enter")
    page.get_by_text("The best 12 of 48, with the cosine.").wait_for()
    assert number(texts(page, ".demo-hit .demo-number")[0]) == 1.0


def sources(page: Any, selector: str) -> list[str]:
    return page.locator(selector).evaluate_all("all => all.map((one) => one.src)")


def test_a_picture_and_a_caption_are_scored(opened: Opened, model: DualEncoderModel) -> None:
    page = opened.page
    tab(page, "Score", "Caption")
    upload(page, "ring.png", png("ring", "blue"))
    page.get_by_alt_text("ring.png").wait_for()
    page.get_by_label("Caption", exact=True).fill("a blue ring")
    page.get_by_label("Other captions").fill(f"a red bar\n{HOSTILE}\na blue ring\n\n")
    page.get_by_role("button", name="Score", exact=True).press("Enter")
    page.locator(".demo-line").first.wait_for()
    captions = ["a blue ring", "a red bar", HOSTILE]
    scores = model.score([draw("ring", "blue")] * 3, captions)
    value = re.fullmatch(r"T = (.+) nats", texts(page, ".demo-value")[0])
    assert value is not None
    assert abs(number(value[1]) - scores[0]) < 0.00051
    assert page.get_by_text(f"σ(T) = {1 / (1 + np.exp(-scores[0])):.3f}: how likely").is_visible()
    rank = 1 + int((scores[1:] >= scores[0]).sum())
    assert page.get_by_text(f"Rank {rank} of 3 captions").is_visible()
    order = [captions[n] for n in np.argsort(-scores)]
    assert texts(page, ".demo-name") == order  # text, not HTML
    page.get_by_text("“a blue ring”.").wait_for()
    page.locator(".demo-line", has_text="a red bar").click()
    page.get_by_text("“a red bar”.").wait_for()


def test_a_picture_is_classified_with_own_labels(opened: Opened, model: DualEncoderModel) -> None:
    page = opened.page
    tab(page, "Classify", "Labels")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("alert").get_by_text("choose a picture first").wait_for()
    upload(page, "cross.png", png("cross", "green"))
    page.get_by_alt_text("cross.png").wait_for()
    page.get_by_label("Labels").fill("circle\ngreen cross\nred bar")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.locator(".demo-line").first.wait_for()
    labels = ["circle", "green cross", "red bar"]
    scores = model.score(
        [draw("cross", "green")] * 3, [f"a photo of a {label}." for label in labels]
    )
    order = np.argsort(-scores)
    assert texts(page, ".demo-value") == [labels[order[0]]]
    assert texts(page, ".demo-name") == [labels[n] for n in order]
    shares = [float(text.removesuffix(" %")) for text in texts(page, ".demo-number")[::2]]
    np.testing.assert_allclose(shares, 100 * softmax(scores)[order], atol=0.051)


def test_the_button_and_a_drop_take_files(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    tab(page, "Score", "Caption")
    (tmp_path / "chosen.png").write_bytes(png("bar", "pink"))
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a picture").press("Enter")
    chooser.value.set_files(tmp_path / "chosen.png")
    page.get_by_alt_text("chosen.png").wait_for()
    assert texts(page, ".demo-value") == [""]  # what was said of another picture is gone
    dropped = page.evaluate_handle(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return data;
        }""",
        list(png("bar", "brown")),
    )
    page.locator(".demo-frame").first.dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_alt_text("dropped.png").wait_for()


def test_what_is_no_picture_is_said_where_it_was_given(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    tab(page, "Classify", "Labels")
    upload(page, "broken.png", b"no picture")
    page.get_by_role("alert").get_by_text("broken.png: cannot be decoded").wait_for()
    large = tmp_path / "large.png"
    large.write_bytes(png("bar", "red") + bytes(MAX_BYTES))
    page.locator("input[type=file]").first.set_input_files(large)
    page.get_by_role("alert").get_by_text("at most 30 MB").wait_for()
    upload(page, "ring.png", png("ring", "red"))  # and goes on
    page.get_by_alt_text("ring.png").wait_for()
    assert texts(page, "[role=alert]") == [""]
    page.get_by_label("Prompt").fill("no place")
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_role("alert").get_by_text("has no {} for the label").wait_for()


def test_nothing_is_asked_of_others_and_nothing_went_wrong(opened: Opened, served: Served) -> None:
    asked = [url for url in opened.requested if not url.startswith(("data:", "blob:"))]
    assert {url.split("/")[2] for url in asked} == {f"127.0.0.1:{served.port}"}
    assert any(url.startswith("ws:") for url in asked)
    assert opened.wrong == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9999"}, 200),  # through a tunnel of ssh
        ({"Host": "evil.example"}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Length": "40000000"}, 413),
    ],
    ids=str,
)
def test_the_server_answers_to_itself(served: Served, headers: dict[str, str], status: int) -> None:
    request = urllib.request.Request(served.url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found, policy = answer.status, answer.headers["Content-Security-Policy"]
    except urllib.error.HTTPError as error:
        found, policy = error.code, None
    assert found == status
    assert policy is None or "default-src 'self'" in policy


def run(coroutine: Any) -> None:
    """In a thread: while the browser is open, this one has a loop of events."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, coroutine).result()


def test_a_body_of_unsaid_length_ends_at_the_limit() -> None:
    given: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope, send
        while not given or given[-1].get("more_body"):
            given.append(await receive())

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(40), "more_body": True}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "headers": [(b"host", b"localhost")]}
    run(demo_guard.Guard(app, ["localhost"], 100)(scope, receive, send))
    assert [message["type"] for message in given] == ["http.request"] * 2 + ["http.disconnect"]


def test_a_socket_of_another_site_is_closed() -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    for headers in ([(b"host", b"evil.example")], [(b"host", b"a:1"), (b"origin", b"http://a:2")]):
        scope = {"type": "websocket", "headers": headers}
        run(demo_guard.Guard(app, ["a"], 100)(scope, app, send))
    assert [message["type"] for message in sent] == ["websocket.close"] * 2


def test_hosts() -> None:
    assert all(map(demo_guard.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(demo_guard.is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))
    names = {"[::1]:8080": "::1", "LocalHost:1": "localhost", "a.b": "a.b", "": "", "[": ""}
    assert {header: demo_guard.host_of(header) for header in names} == names
    assert demo.address("::1", 80) == "http://[::1]:80/"


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_server_that_others_reach_is_warned_of(
    host: str,
    warned: bool,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served: list[tuple[str, int]] = []

    class Stopped:
        def run(self, sockets: list[Any]) -> None:
            served.extend(one.getsockname() for one in sockets)
            sockets[0].close()
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "build_server", lambda engine, host: Stopped())
    monkeypatch.setattr(Engine, "warm", lambda self: None)
    demo.serve(engine, host, 0, open_page=False)
    ((bound, port),) = served
    assert bound == host
    assert capsys.readouterr().out.startswith(f"http://{host}:{port}/")
    assert ("there is no password" in caplog.text) == warned


def test_a_port_that_cannot_be_is_refused() -> None:
    with demo.listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"in use.*--port 0"):
            demo.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--port 99999"):
        demo.listen("127.0.0.1", 99_999)
    with pytest.raises(ConfigError, match="--host nowhere.invalid"):
        demo.listen("nowhere.invalid", 0)


def test_the_command(
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(demo, "serve", lambda *given: calls.append(given))
    for shape in ("ring", "bar"):
        draw(shape, "red").save(tmp_path / f"{shape}.png")
    command = ["demo", "--model", str(finished_run), "--no-open"]
    assert cli.main([*command, "--images", str(tmp_path), "--port", "0"]) == 0
    (engine, host, port, open_page), *_ = calls
    assert (host, port, open_page) == ("127.0.0.1", 0, False)
    assert engine.index.count() == 2
    assert cli.main(["demo"]) == 2
    assert "--model is missing" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "nicegui", None)
    assert cli.main(command) == 2
    assert "pip install 'clip-lite-jax[demo]'" in capfd.readouterr().err


def test_the_engine_finds_what_search_finds(engine: Engine, pairs: Path) -> None:
    ring = engine.picture((pairs.parent / "red_ring.png").read_bytes(), "ring")
    assert engine.index is not None
    for kind, measure in (("images", "cosine"), ("texts", "T")):
        found = engine.search([Wanted(picture=ring)], [], 3, kind)
        assert found.measure == measure
    wanted = [Wanted(picture=ring), Wanted("a bar", weight=-0.5)]
    mixture = engine.search(wanted, ["red"], 48)
    one = ring.embedding / np.linalg.norm(ring.embedding)
    other, red = (engine.model.encode_text([text])[0] for text in ("a bar", "red"))
    query = one - 0.5 * other
    query /= np.linalg.norm(query)
    query -= red * (query @ red)
    rows = engine.model.encode_image([hit.path for hit in mixture.hits])  # type: ignore[misc]
    values = rows @ (query / np.linalg.norm(query))
    np.testing.assert_allclose([hit.value for hit in mixture.hits], values, atol=1e-5)
    assert engine.thumbnails(mixture)[0].startswith("data:image/jpeg;base64,")


def test_the_engine_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="write what to look for"):
        engine.search([], [], 3)
    with pytest.raises(ConfigError, match="0 hits: choose 1 to 100"):
        engine.search([Wanted("a")], [], 0)
    for row in (-1, 48):
        with pytest.raises(DataError, match=f"row {row}: the index has 48"):
            engine.of_row(row)
    with pytest.raises(ConfigError, match="--images FOLDER"):
        Engine(engine.model).search([Wanted("a")], [], 3)
    monkeypatch.setattr(demo_engine, "MAX_BYTES", 10)
    with pytest.raises(BadImage, match="big.png: 11 bytes, over 10"):
        engine.picture(bytes(11), "big.png")


def test_heat_is_that_of_the_model_on_the_picture_as_it_is_shown(engine: Engine) -> None:
    picture = draw("cross", "red", 64).crop((0, 8, 64, 56))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    ours = engine.heat(engine.picture(buffer.getvalue(), "cross"), "a red cross")
    (theirs,) = engine.model.heat_map([picture], ["a red cross"])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    layer = np.asarray(demo_views.heat_layer(np.array([[0.0, 1.0], [4.0, 2.0]], np.float32)))
    assert layer[..., 3].tolist() == [[0, 50], [200, 100]]
    assert not np.asarray(demo_views.heat_layer(np.zeros((2, 2), np.float32)))[..., 3].any()


def test_samples_are_of_the_index_or_built_in(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    assert engine.sample(rng).name.endswith(".png")
    drawn = Engine(engine.model).sample(rng)
    assert drawn.caption
    assert drawn.shown.size == (64, 64)


def test_what_is_typed() -> None:
    assert demo_views.lines(" a\n\nb \na\n", "labels") == ["a", "b"]
    assert demo_views.lines(None, "labels") == []
    with pytest.raises(ConfigError, match="201 labels: give at most 200"):
        demo_views.lines("\n".join(map(str, range(201))), "labels")
    with pytest.raises(ConfigError, match="1001 letters"):
        demo_views.lines("a" * 1001, "labels")
    assert demo_views.prompts(["{0.x}", "b"], "a {}, {}") == ["a {0.x}, {0.x}", "a b, b"]
    assert demo_views.prompts(["b"], "") == ["b"]
    for value in (None, float("nan"), "1"):
        with pytest.raises(ConfigError, match="a weight is a number"):
            demo_views.weight(value)


def test_numbers() -> None:
    scores = np.array([1.0, 3.0, 1.0, -800.0], np.float32)
    assert demo_views.ranks(scores) == [3, 1, 3, 4]  # ties count against
    np.testing.assert_allclose(demo_views.softmax(scores), softmax(scores.astype(np.float64)))
    assert [demo_views.sigmoid(score) for score in (0, 1e9, -1e9)] == [0.5, 1.0, pytest.approx(0)]
    assert [demo_views.signed(x) for x in (1.234, -1.236, -0.001)] == ["1.23", "−1.24", "0.00"]
    assert demo_views.fitted(Image.new("RGB", (2000, 1)), 640).size == (640, 1)


def test_of_biased_negatives_no_probability_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page of a visitor, without a browser: what its labels would say."""
    config = replace(engine.model.config, negatives=NegativesConfig(name="hard"))
    monkeypatch.setattr(engine.model, "config", config)

    def page() -> tuple[ScoreTab, ClassifyTab]:
        with ui.element():
            return ScoreTab(engine), ClassifyTab(engine)

    with Client(ui.page("/biased")):
        score, classify = page()
        score._show(["a"], np.zeros(1, np.float32))
    assert score._means.text == "σ(T) = 0.500, no probability"
    assert "negatives.name=hard" in score._caution.text
    assert classify._cautioned
