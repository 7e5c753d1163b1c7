"""The page at `/`, in Debian's Chromium where there is one."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
from edgetune_runtime.answer_log.reading import read_answer_log
from edgetune_runtime.bundle import ASK
from edgetune_runtime.bundle.records import UnsureRule
from edgetune_runtime.server.rewriting import Rewriter
from edgetune_runtime.server.settings import Access
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from runtime.bundles import change_manifest
from runtime.server.conftest import Running, Start, started
from runtime.server.test_routing import with_router

KEY = "a-key-of-more-than-sixteen-characters"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Without these, Chromium looks for hosts of its own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
# The page's colors by name, each as red, green and blue.
COLORS = r"""() => {
  const style = getComputedStyle(document.documentElement);
  const probe = document.body.appendChild(document.createElement("i"));
  const color = name => { probe.style.color = style.getPropertyValue(name); return getComputedStyle(probe).color; };
  const names = ["ink", "soft", "page", "card", "accent", "on-accent", "train", "validation", "bad"];
  return Object.fromEntries(names.map(name => [name, color("--" + name).match(/\d+/g).map(Number)]));
}"""
Visit = Callable[..., Page]

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """`visit(server, **context options)` opens the page; at the end of the test it must have reported no error."""
    problems: list[str] = []
    contexts = []

    def go(server: Running, **options: Any) -> Page:  # noqa: ANN401 - playwright's options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: None if is_status(message.text) else problems.append(message.text))
        page.goto(server.url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert problems == []


def is_status(message: str) -> bool:
    """Whether Chromium reports the status of a refused request, which the page shows itself."""
    return message.startswith("Failed to load resource")


def test_a_browser_gets_the_page_and_other_clients_a_line_of_text(server: Running) -> None:
    assert server.client.get("/").text.startswith("edgetune-run serves ")
    reply = server.client.get("/", headers={"Accept": "text/html,*/*"})
    policy = reply.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", reply.text), "no assets from outside"


def test_the_facts_of_the_bundle_need_the_key(start: Start) -> None:
    server = start(access=Access((KEY,)))
    assert server.client.get("/edgetune/bundle").status_code == 401
    facts = server.client.get("/edgetune/bundle", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert [model["name"] for model in facts["models"]][1:] == server.runtime.adapters
    assert facts["context_length"] == server.runtime.context_length
    assert "method" not in facts["models"][0]
    assert [model["kind"] for model in facts["models"]] == ["base", "adapter", "adapter", "adapter"]


@needs_browser
def test_the_page_streams_the_answers_of_two_adapters_by_keyboard_alone(server: Running, visit: Visit) -> None:
    first, second = server.runtime.adapters[:2]
    page = visit(server)
    page.get_by_label("side by side").focus()
    page.keyboard.press("Space")
    selects = page.get_by_label("Adapter", exact=True)
    expect(selects).to_have_count(2)
    selects.nth(0).select_option(first)
    selects.nth(1).select_option(second)
    page.get_by_label("most tokens").fill("12")
    page.get_by_role("textbox", name="Prompt").focus()
    page.keyboard.type("turn on the light")
    page.keyboard.press("Enter")
    answers = page.get_by_role("status", name="Answer")
    for place, adapter in enumerate((first, second)):
        wanted = server.runtime.generate("turn on the light", adapter=adapter, max_tokens=12).text
        expect(answers.nth(place)).to_have_text(wanted, use_inner_text=False)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect(page.locator(".figures").first).to_contain_text("first token")
    expect(page.locator(".figures").first).to_contain_text("µs")


@needs_browser
def test_an_answer_is_confirmed_or_corrected_on_the_page(
    home: Path, start: Start, visit: Visit, tmp_path: Path
) -> None:
    # Answers that end.
    change_manifest(home, lambda raw: raw["adapters"]["command"].update(output={"choices": ["on", "off"]}))
    server = start(home, log=tmp_path / "answers.jsonl")
    page = visit(server)
    page.get_by_label("Adapter", exact=True).first.select_option("command")
    page.get_by_label("most tokens").fill("20")
    prompt, send = page.get_by_role("textbox", name="Prompt"), page.get_by_role("button", name="Send")
    for text, correction in (("turn on the light", None), ("close the blind", "blind.close"), ("stop", "")):
        prompt.fill(text)
        send.click()
        if correction is None:
            page.get_by_role("button", name="right").first.click()
        else:
            page.get_by_role("button", name="correct it").first.click()
            expect(page.get_by_text("Noted as wrong.").first).to_be_visible()
        if correction:
            page.get_by_label("Correction").first.fill(correction)
            page.get_by_role("button", name="Save the correction").first.click()
        expect(page.get_by_text("Noted").first).to_be_visible()
    first, second, third = read_answer_log(tmp_path / "answers.jsonl", server.runtime.manifest)
    assert (first.messages[0]["content"], first.correction) == ("turn on the light", first.answer)
    assert (second.adapter, second.correction) == ("command", "blind.close")
    assert (third.is_wrong, third.correction) == (True, None)


@needs_browser
def test_a_correction_that_is_not_saved_is_said_and_stays(start: Start, visit: Visit, tmp_path: Path) -> None:
    page = visit(start(log=tmp_path / "answers.jsonl"))
    page.get_by_label("Adapter", exact=True).first.select_option("command")
    page.get_by_label("most tokens").fill("4")
    page.get_by_role("textbox", name="Prompt").fill("stop")
    page.get_by_role("button", name="Send").click()
    wrong, save = (page.get_by_role("button", name=name).first for name in ("correct it", "Save the correction"))
    box = page.get_by_label("Correction").first
    wrong.click()
    expect(page.get_by_text("Noted as wrong.").first).to_be_visible()
    save.click()
    expect(page.get_by_text("the answer that was wrong: change it").first).to_be_visible()
    box.fill(" ")
    save.click()
    expect(page.get_by_text("Give the right answer.").first).to_be_visible()
    box.fill(" blind.close\n")
    wrong.click()
    expect(box).to_have_value(" blind.close\n")
    page.route("**/edgetune/corrections", lambda route: route.abort())
    save.click()
    expect(page.get_by_text("Not saved: ").first).to_be_visible()
    page.unroute("**/edgetune/corrections")
    sent: list[str | None] = []
    page.on("request", lambda request: sent.append(request.post_data))
    save.click()
    expect(page.get_by_text("Noted.", exact=True).first).to_be_visible()
    assert '"correction":"blind.close"' in str(sent[-1])


@needs_browser
@pytest.mark.parametrize(("least", "unsure"), [(0.0, ""), (1.0, "asked back")])
def test_the_page_says_how_sure_an_answer_is_and_what_stands_in_its_place(
    least: float, unsure: str, sure_bundle: Path, start: Start, visit: Visit, tmp_path: Path
) -> None:
    home = Path(shutil.copytree(sure_bundle, tmp_path / "home"))
    about = {"output": {"choices": ["on", "off"]}, "unsure": asdict(UnsureRule(least, ASK, "Which room?"))}

    def change(raw: dict[str, Any]) -> None:
        raw["adapters"]["command"].update(about)
        curves = raw["adapters"]["command"]["confidence"]["gguf"]
        curves["choice"] = curves["value"]

    change_manifest(home, change)
    page = visit(start(home, log=tmp_path / "answers.jsonl"))
    page.get_by_label("Adapter", exact=True).first.select_option("command")
    page.get_by_label("most tokens").fill("20")
    page.get_by_role("textbox", name="Prompt").fill("turn on the light")
    page.get_by_role("button", name="Send").click()
    figures = page.locator(".figures").first
    expect(figures).to_contain_text(re.compile(r"confidence\d+ %"))
    expect(figures).to_contain_text(f"unsure{unsure}") if unsure else expect(figures).not_to_contain_text("unsure")
    page.get_by_role("button", name="correct it").first.click()
    expect(page.get_by_label("Correction").first).to_have_value("" if unsure else re.compile("on|off"))


@needs_browser
@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ('data: {"error": {"message": "the server is stopping"}}\n\n', "the server is stopping"),
        ("", "The connection ended before the answer did."),
    ],
)
def test_what_an_answer_has_before_it_fails_stays(server: Running, visit: Visit, end: str, problem: str) -> None:
    page = visit(server)
    piece = 'data: {"choices": [{"delta": {"content": "turn on"}}]}\n\n'
    page.route("**/completions", lambda route: route.fulfill(content_type="text/event-stream", body=piece + end))
    page.get_by_role("textbox", name="Prompt").fill("stop")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status", name="Answer").first).to_have_text(f"turn on{problem}")


@needs_browser
def test_two_panes_are_there_again_when_the_user_comes_back(server: Running, visit: Visit) -> None:
    page = visit(server)
    page.get_by_label("side by side").check()
    page.goto(f"{server.url}/health")
    page.go_back()
    expect(page.get_by_label("side by side")).to_be_checked()
    expect(page.get_by_label("Adapter", exact=True)).to_have_count(2)
    expect(page.get_by_label("Adapter", exact=True).last).to_be_visible()


@needs_browser
def test_a_late_reply_says_nothing_about_the_next_answer(start: Start, visit: Visit, tmp_path: Path) -> None:
    page = visit(start(log=tmp_path / "answers.jsonl"))
    page.get_by_label("Adapter", exact=True).first.select_option("command")
    page.get_by_label("most tokens").fill("4")
    held: list[Route] = []
    page.route("**/edgetune/corrections", lambda route: held.append(route))  # noqa: PLW0108 - a builtin has no attributes
    for text in ("stop", "go"):
        page.get_by_role("textbox", name="Prompt").fill(text)
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        if text == "stop":
            page.get_by_role("button", name="correct it").first.click()
    with page.expect_response("**/edgetune/corrections"):
        held[0].continue_()
    expect(page.locator(".judge").first).to_be_visible()
    expect(page.get_by_text("Noted")).to_have_count(0)


@needs_browser
@pytest.mark.parametrize("name", ["home", "command"])
def test_what_the_router_chose_is_judged_if_it_is_an_adapter(
    name: str, bundle: Path, start: Start, visit: Visit, tmp_path: Path
) -> None:
    home = with_router(bundle, tmp_path / "home")
    change_manifest(home, lambda raw: raw.update(name=name))
    page = visit(start(home, log=tmp_path / "answers.jsonl"))
    page.get_by_label("Adapter", exact=True).first.select_option("auto")
    page.get_by_label("most tokens").fill("4")
    for text, is_judged in (("the lamp", True), ("who is there", False)):
        page.get_by_role("textbox", name="Prompt").fill(text)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".figures").first).to_contain_text("first token")
        expect(page.get_by_role("button", name="correct it").first).to_be_visible(visible=is_judged)


@needs_browser
def test_without_a_log_no_correction_is_asked_for_and_a_server_that_cannot_be_reached_any_more_is_reported(
    server: Running, visit: Visit
) -> None:
    page = visit(server)
    page.get_by_label("most tokens").fill("4")
    page.route("**/edgetune/bundle", lambda route: route.abort())
    page.get_by_role("textbox", name="Prompt").fill("play")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".figures").first).to_contain_text("first token")
    expect(page.get_by_role("button", name="correct it").first).to_be_hidden()
    expect(page.locator("#about")).to_have_text("Failed to fetch")


@needs_browser
def test_a_screen_reader_is_told_when_an_answer_is_whole_and_reads_only_what_is_new(start: Start, visit: Visit) -> None:
    server = start(contexts=1)
    page = visit(server)
    answer = page.get_by_role("status", name="Answer").first
    expect(answer).to_have_attribute("aria-atomic", "false")
    expect(answer).to_have_attribute("aria-busy", "false")
    page.get_by_label("most tokens").fill("12")
    page.get_by_role("textbox", name="Prompt").fill("turn on the light")
    # With the only context taken, the answer has to wait.
    with closing(server.runtime.stream("play", max_tokens=20)) as stream:
        next(stream)
        page.get_by_role("button", name="Send").click()
        expect(answer).to_have_attribute("aria-busy", "true")
    expect(answer).to_have_attribute("aria-busy", "false")
    assert answer.evaluate("answer => answer.childNodes.length") > 5, "a node per piece"


@needs_browser
def test_models_are_labelled_by_what_they_answer_with(home: Path, visit: Visit) -> None:
    # As of an adapter whose origin is not known.
    change_manifest(home, lambda raw: raw["adapters"]["tone"].update(method=""))
    # Its chats are not asked for.
    rewriters = [Rewriter("short", lambda messages, tools: pytest.fail("a chat was rewritten"))]
    with started(home, rewriters=rewriters, contexts=1) as server:
        page = visit(server)
        select = page.get_by_label("Adapter", exact=True).first
        names = ["home (base)", "command", "tone", "whole", "short (rewrites chats)"]
        expect(select.locator("option")).to_have_text(names)
        expect(select).to_have_value("command")
        for name, heading in (("home", "the base"), ("tone", "this adapter"), ("short", "this model")):
            select.select_option(name)
            expect(page.locator("summary").first).to_have_text(f"About {heading}")
        page.locator("summary").first.click()
        expect(page.locator(".facts").first).to_contain_text("rewritten by a function of this server")


@needs_browser
def test_texts_stand_out_from_what_is_behind_them(server: Running, visit: Visit) -> None:
    page = visit(server)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    texts = [(name, "card") for name in ("ink", "soft", "train", "validation", "bad")]
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(COLORS)
        assert (luminance(colors["page"]) > 0.5) == (scheme == "light")
        for text, ground in [*texts, ("ink", "page"), ("soft", "page"), ("on-accent", "accent")]:
            lighter, darker = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
            # The least of WCAG 2, level AA.
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (scheme, text, ground)


def luminance(color: list[int]) -> float:
    """The relative luminance of an sRGB color, as WCAG defines it."""
    parts = [value / 255 for value in color]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_browser
def test_the_page_fits_a_phone(server: Running, visit: Visit) -> None:
    page = visit(server, viewport={"width": 360, "height": 700})
    page.get_by_label("side by side").check()
    page.get_by_text("About this adapter").first.click()
    expect(page.get_by_text("method", exact=True).first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@needs_browser
def test_the_page_asks_for_the_key_and_says_when_it_is_wrong(start: Start, visit: Visit) -> None:
    page = visit(start(access=Access((KEY,))))
    key = page.get_by_label("This server asks for an API key.")
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That key is wrong.")
    key.fill("\u201c" + KEY)
    key.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("non ISO-8859-1 code point")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("non ISO-8859-1 code point")
    key.fill(KEY)
    key.press("Enter")
    expect(page.get_by_role("textbox", name="Prompt")).to_be_visible()
    expect(key).to_be_hidden()
    # As if the server had got another key since.
    page.evaluate("sessionStorage.setItem('key', 'another')")
    page.get_by_role("textbox", name="Prompt").fill("stop")
    page.get_by_role("button", name="Send").click()
    expect(key).to_be_visible()


@needs_browser
def test_a_bundle_that_does_not_come_is_explained(server: Running, visit: Visit) -> None:
    page = visit(server)
    sent: dict[str, Any] = {"status": 503, "body": '{"error":"busy; try again"}'}
    page.route("**/edgetune/bundle", lambda route: route.fulfill(**sent))
    page.reload()
    expect(page.locator("#about")).to_have_text("busy; try again")
    sent.update(status=502, body="<h1>")
    page.reload()
    expect(page.locator("#about")).to_have_text("The server answers with status 502.")
    expect(page.locator("h1")).to_have_text("edgetune")


@needs_browser
def test_an_answer_that_is_stopped_leaves_the_server(start: Start, visit: Visit) -> None:
    server = start(contexts=1)
    page = visit(server)
    page.get_by_role("textbox", name="Prompt").fill("tell me a story")
    # With the only context taken, the answer has to wait.
    with closing(server.runtime.stream("play", max_tokens=20)) as stream:
        next(stream)
        page.get_by_role("button", name="Send").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        expect(page.get_by_role("status", name="Answer").first).to_have_text("(stopped)")
        route = 'edgetune_requests_total{route="/v1/chat/completions",status="499"} 1.0'
        for _ in range(100):
            if route in server.client.get("/metrics").text:
                break
            page.wait_for_timeout(50)
        else:
            pytest.fail("the request still waits")


@needs_browser
def test_what_the_server_refuses_is_shown_in_place_of_the_answer(server: Running, visit: Visit) -> None:
    page = visit(server)
    page.get_by_role("textbox", name="Prompt").fill("light " * 2000)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status", name="Answer").first).to_contain_text("context")
