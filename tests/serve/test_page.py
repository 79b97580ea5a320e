"""The page in a real browser: columns, stopping, reloading, many tabs, votes, exports, hostile text, other names."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted import Scripted

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

Serve = Callable[..., Any]
HOSTILE = [
    "<img src=x onerror=document.title='hit'>",
    "<script>document.title='hit'</script>",
    "<svg onload=document.title='hit'>",
    "[a](javascript:document.title='hit')",
    "![a](http://evil.example/x.png)",
    "<a href='javascript:document.title=1'>a</a>",
    "<iframe srcdoc='<script>parent.document.title=1</script>'>",
    "<style>body{display:none}</style>",
    "<form action=//evil.example><input name=a></form>",
    "\u202egnp.exe \u200b\x1b[31m",
    "`<b onmouseover=alert(1)>`",
    "| a | b |\n|---|---|\n| <img src=x onerror=document.title='hit'> | **c** |",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(
            executable_path=CHROMIUM, args=["--host-resolver-rules=MAP evil.example 127.0.0.1"]
        )
        yield found
        found.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    found = browser.new_context()
    found.set_default_timeout(15_000)
    yield found
    found.close()


def opened(context: Any, url: str) -> Any:
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".column")
    return page


def send(page: Any, text: str = "hello?") -> None:
    page.fill("#prompt", text)
    page.click("#send")


def answers(page: Any) -> list[str]:
    return list(page.locator(".turn.assistant:last-child .text").all_inner_texts())


def done(page: Any) -> None:
    page.wait_for_selector("#send:not([disabled])")


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_one_prompt_goes_to_all_and_each_answers_in_its_column(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["I ", "say ", "世界 🙂"], "tuned": ["Hello"]}, delay_s=0.01)
    page = opened(context, serve(engine).url)
    page.click("summary:has-text('System prompt')")
    page.fill("#system", "be brief")
    send(page)
    done(page)
    assert answers(page) == ["I say 世界 🙂", "Hello"]
    assert "3 tokens" in page.inner_text(".column:first-child .note")
    assert [dict(m) for m in engine.asked[0].messages or ()] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello?"},
    ]
    send(page, "and now?")
    done(page)
    assert [m["role"] for m in engine.asked[-1].messages or ()] == ["system", "user", "assistant", "user"]


def test_settings_of_a_column_are_its_own(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["a", "b", "c"], "tuned": ["a", "b", "c"]})
    page = opened(context, serve(engine).url)
    page.click(".column:first-child summary")
    page.fill(".column:first-child [name=temperature]", "0.7")
    page.fill(".column:first-child [name=max_tokens]", "2")
    page.select_option(".column:first-child [name=template]", "alpaca")
    send(page)
    done(page)
    assert answers(page) == ["ab", "abc"]
    first = next(ask for ask in engine.asked if ask.model == "raw")
    assert (first.settings.sampling.temperature, first.template) == (0.7, "alpaca")


def test_stop_stops_one_column_or_all_and_leaves_nothing_at_work(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["x "] * 5000, "tuned": ["y "] * 5000}, delay_s=0.01)
    page = opened(context, serve(engine).url)
    send(page)
    page.wait_for_selector(".column:nth-child(2) .turn.assistant .text:not(:empty)")
    page.click(".column:first-child .stop")
    wait_for(lambda: engine.live == 1, 1)
    page.wait_for_selector(".column .note:has-text('stopped')")
    page.click("#stop")
    wait_for(lambda: engine.live == 0, 1)
    done(page)


def test_what_was_said_is_there_after_a_reload_and_a_page_that_goes_stops_its_texts(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["x "] * 5000}, delay_s=0.01)
    page = opened(context, serve(engine).url)
    send(page)
    page.wait_for_selector(".turn.assistant .text:not(:empty)")
    page.reload()
    wait_for(lambda: engine.live == 0, 2)
    page.wait_for_selector(".turn.user")
    assert page.inner_text(".turn.user .text") == "hello?"
    assert page.is_enabled("#send")


def test_eight_tabs_are_answered_at_the_same_time(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["word "] * 40}, delay_s=0.05)
    url = serve(engine).url
    pages = [opened(context, url) for _ in range(8)]
    for page in pages:
        send(page)
    wait_for(lambda: engine.live == 8)
    for page in pages:
        done(page)
        assert answers(page) == ["word " * 40]


def test_regenerating_editing_and_dropping_turns(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw": ["a"], "tuned": ["b"]})
    page = opened(context, serve(engine).url)
    for text in ("one", "two"):
        send(page, text)
        done(page)
    page.click(".column:first-child .again")
    done(page)
    assert len(engine.asked) == 5
    assert len(engine.asked[-1].messages or ()) == 3
    page.click("summary:has-text('More')")
    page.click("#drop")
    assert page.locator(".column:first-child .turn").count() == 2
    page.locator(".column:first-child .turn.user button").click()
    assert page.input_value("#prompt") == "two"
    assert page.locator(".turn").count() == 0


def test_votes_of_the_blind_name_no_model_before(context: Any, serve: Serve) -> None:
    engine = Scripted({"raw-model": ["a"], "tuned-model": ["b"]})
    page = opened(context, serve(engine).url)
    page.check("#blind")
    send(page)
    done(page)
    assert "model" not in page.inner_text("#columns").replace("Model ", "")
    page.wait_for_selector("#ballot button")
    assert page.locator("#ballot button").all_inner_texts() == [
        *("Model A is better", "Model B is better", "Tie", "Both are bad")
    ]
    chosen = page.inner_text(".column:first-child .turn.assistant .text")
    page.click("#ballot button:first-child")
    better = {"a": "raw-model", "b": "tuned-model"}[chosen]
    assert page.locator("#votes tbody tr", has_text=better).inner_text().split() == [better, "1", "0", "0"]
    with page.expect_download() as download:
        page.click("summary:has-text('More')")
        page.click("#export-json")
    document = json.loads(download.value.path().read_text())
    assert (document["votes"][0]["best"], document["votes"][0]["blind"]) == (better, True)
    with page.expect_download() as download:
        page.click("#export-markdown")
    assert "## assistant\n\n```\n" in download.value.path().read_text()


def test_hostile_text_is_text(context: Any, serve: Serve) -> None:
    engine = Scripted({f"raw {HOSTILE[0]}": [piece + "\n\n" for piece in HOSTILE]})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    url = serve(engine).url
    page.goto(url)
    page.wait_for_selector(".column")
    send(page, HOSTILE[0])
    done(page)
    assert HOSTILE[0] in page.inner_text(".turn.assistant .text")
    page.check("#markdown")
    page.wait_for_selector(".text.rendered")
    assert page.title() == "weightops"
    assert page.locator(".turns :is(img, script, svg, iframe, style, form, input)").count() == 0
    assert page.locator(".turns a[href^=javascript]").count() == 0
    assert page.locator(".turns strong").inner_text() == "c"
    assert "\\u{202e}" in page.inner_text(".turn.assistant .text")
    assert [each for each in asked if not each.startswith(url)] == []


def test_other_names_that_lead_here_see_nothing(context: Any, serve: Serve) -> None:
    running = serve(Scripted({"raw": ["a"]}))
    page = context.new_page()
    assert page.goto(f"http://evil.example:{running.port}/").status == 400
    assert page.goto(f"http://evil.example:{running.port}/v1/models").status == 400
    # A page of another origin: neither reading nor sending works.
    other = serve(Scripted({"raw": ["a"]}))
    page.goto(other.url)
    failed = page.evaluate(
        """async (url) => {
            const tries = [fetch(url + "/v1/models"), fetch(url + "/chat", {method: "POST", body: '{"question":"a"}'})];
            return (await Promise.allSettled(tries)).map((each) => each.status);
        }""",
        running.url,
    )
    assert failed == ["rejected", "rejected"]
    assert running.engine.asked == []


def test_the_page_is_small_quick_and_needs_nobody_else(context: Any, serve: Serve) -> None:
    page = context.new_page()
    sizes: list[int] = []
    page.on("response", lambda response: sizes.append(len(response.body())))
    running = serve(Scripted({"raw": ["a"]}))
    page.goto(running.url)
    page.wait_for_selector(".column")
    page.wait_for_load_state()
    assert 1000 < sum(sizes) < 100_000


def test_it_works_by_keyboard_and_on_a_phone(browser: Any, serve: Serve) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = opened(context, serve(Scripted({"raw": ["a"], "tuned": ["b"]})).url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.focus("#prompt")
    page.keyboard.type("hello")
    page.keyboard.press("Control+Enter")
    done(page)
    assert answers(page) == ["a", "b"]
    named = "e => e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label')"
    controls = "[...document.querySelectorAll('button, input, select, textarea')].filter(e => e.offsetParent)"
    names = page.evaluate(f"{controls}.map({named})")
    assert all(names)
    context.close()
