"""The agent's page in a real browser: a question is asked, its answer arrives, a citation opens its passage, markup stays text."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from answering import DONE, THINK, TOKEN, Agent, Shelf, listening, until
from browser import CHROMIUM, Browser, browser

from research_rl.episode.trajectory import Passage

MARKUP = '<img src=x onerror="document.title=1"><b>🌉</b>'
STATUS = "document.getElementById('status').textContent"
BLOCKS = "JSON.stringify([...document.querySelectorAll('#run .block')].map((b) => b.className))"
PRESSED = "[...document.querySelectorAll('.verdict [aria-pressed]')].map((b) => b.getAttribute('aria-pressed')).join(' ')"
CITE = "document.querySelector('.citations button').click(), document.querySelector('mark').textContent"


async def _key(tab: Browser, key: str, number: int, text: str = "") -> None:
    """Press a key as a person does."""
    press = {"key": key, "code": key, "windowsVirtualKeyCode": number}
    await tab.call("Input.dispatchKeyEvent", type="keyDown", **press, **({"text": text} if text else {}))
    await tab.call("Input.dispatchKeyEvent", type="keyUp", **press)


async def _ask(tab: Browser) -> None:
    await tab.value("document.getElementById('question').value = ''")
    await tab.value("document.getElementById('question').focus()")
    await tab.call("Input.insertText", text="Who founded Aldmoor Mill?")
    await _key(tab, "Enter", 13, "\r")


async def _asked(tab: Browser, url: str, agent: Agent) -> None:
    assert agent.policy.holds
    await tab.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    await tab.open(f"{url}/#{TOKEN}", "document.getElementById('model').textContent === 'policy-test'")
    assert await tab.value("location.hash") == "", "the token stays in the address"
    await _ask(tab)
    # The first half of the first turn is there while the policy is held.
    await tab.until("(document.querySelector('#run .thought') || {textContent: ''}).textContent.includes('I look')")
    agent.policy.holds.set()
    await tab.until(f"{STATUS} === 'Done.'")
    assert await tab.value("document.getElementById('spoken').textContent") == "The answer: Ada King"
    assert await tab.value(BLOCKS) == '["block thought","block search","block thought","block answer","block"]'
    assert await tab.value(CITE) == "Ada King"
    assert await tab.value("document.activeElement.tagName") == "SUMMARY"
    assert await tab.value("document.querySelectorAll('#run img, #run b').length") == 0 and await tab.value("document.title") == "Ask"
    assert await tab.value("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than a phone"


async def _judged_and_shared(tab: Browser, agent: Agent) -> None:
    journal = agent.feedback.folder / "feedback.jsonl"
    assert await tab.value(f"{PRESSED} === 'false false' && document.querySelector('.verdict .more').hidden")
    await tab.value("document.querySelector('.verdict button').focus()")
    await _key(tab, "Enter", 13, "\r")
    await tab.until(f"{STATUS} === 'Your verdict is kept.'")
    assert await tab.value(f"{PRESSED} === 'true false' && !document.querySelector('.verdict .more').hidden")
    await tab.value("document.querySelector('.verdict [value=down]').click()")
    await tab.until(f"{PRESSED} === 'false true'")
    field = "document.querySelector('.verdict [name=answer]')"
    await tab.value(f"{field}.value = 'Ada <b>Lovelace</b>', {field}.form.requestSubmit()")
    until(lambda: len(journal.read_text().splitlines()) == 3)
    said = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [(line["verdict"], line["answer"]) for line in said] == [("up", None), ("down", None), ("down", "Ada <b>Lovelace</b>")]
    assert await tab.value("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than a phone"
    await tab.value("navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    await tab.value("document.querySelectorAll('.verdict button')[2].click()")
    await tab.until("document.querySelector('.verdict .link') !== null")
    assert await tab.value("document.querySelector('.verdict .link').value.endsWith('/#question=Who%20founded%20Aldmoor%20Mill%3F')")


async def _stopped_and_remembered(tab: Browser, agent: Agent) -> None:
    agent.policy.holds = threading.Event()
    for stop in ("Escape", "Enter on the button"):
        agent.policy.cancelled.clear()
        await _ask(tab)
        await tab.until("!document.getElementById('stop').hidden")
        if stop == "Escape":
            await _key(tab, "Escape", 27)
        else:
            # From the question over the button that asks to the one that stops.
            await _key(tab, "Tab", 9)
            await _key(tab, "Tab", 9)
            assert await tab.value("document.activeElement.id") == "stop"
            await _key(tab, "Enter", 13, "\r")
        await tab.until(f"{STATUS} === 'Stopped.'")
        until(agent.policy.cancelled.is_set)
        assert await tab.value("document.activeElement.id") == "question", "the focus is lost"
    await tab.value("document.querySelector('#history button').click()")
    assert await tab.value("document.querySelector('#run .answer').textContent") == "answerIt is Ada King"
    assert await tab.value(PRESSED) == "false true", "the verdict is forgotten"


async def _opened_by_a_link(tab: Browser, url: str) -> None:
    await tab.open(f"{url}/?again#question=Who%20is%20%3Cb%3E%3F", "document.getElementById('model').textContent === 'policy-test'")
    assert await tab.value("document.getElementById('question').value") == "Who is <b>?"
    assert await tab.value("location.hash") == ""
    # In the same tab, and one that is no text.
    for link, question in (("#question=and%20who%3F", "and who?"), ("#question=100%", "100%")):
        await tab.value(f"location.hash = '{link}'")
        await tab.until(f"document.getElementById('question').value === '{question}'")
    assert await tab.value("location.hash") == ""


async def _dark(tab: Browser) -> None:
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
    light = await tab.value(shade)
    await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert light > 200 > 60 > await tab.value(shade)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_question_is_asked_on_the_page(tmp_path: Path) -> None:
    agent = Agent(THINK, DONE, shelf=Shelf(Passage("p1", f"Mill\n{MARKUP} founded by Ada King.")))
    agent.policy.holds = threading.Event()

    async def main(url: str) -> None:
        async with browser(tmp_path) as tab:
            await _asked(tab, url, agent)
            await _judged_and_shared(tab, agent)
            await _stopped_and_remembered(tab, agent)
            await _opened_by_a_link(tab, url)
            await _dark(tab)

    with listening(agent) as (url, _, _):
        asyncio.run(main(url))
    assert agent.policy.cancelled.is_set(), "the stop button did not end the episode"
