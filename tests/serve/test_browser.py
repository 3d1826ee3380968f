"""The page in a browser: a chat over turns with its gauge, on a phone and on a wide screen, in light and in dark."""

import pytest

from serve import browser

ASK = """
(text) => { document.getElementById("text").value = text; document.getElementById("ask").requestSubmit(); }
"""
DONE = 'document.getElementById("send").textContent === "Send" && document.querySelectorAll(".assistant").length === {}'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    program = browser.found()
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with browser.page(program, tmp_path_factory.mktemp("profile")) as one:
        yield one


def test_a_chat_on_the_page_has_replies_and_a_gauge_and_fits_every_screen(page, serving, tmp_path):
    with serving(reply_tokens=12) as one:
        page.screen(390, 844, dark=False)
        page.do("Page.navigate", url=one.url)
        page.wait('document.getElementById("model")?.textContent.includes("snapkv")')
        page.run('document.getElementById("shade").click()')
        for count, text in enumerate(("Anna lives in Turin. She has a cat.", "Where does Anna live?"), start=1):
            page.run(f"({ASK})({text!r})")
            page.wait(DONE.format(count))
        assert page.run('document.querySelectorAll("#turns > div").length') == 2
        assert page.run('document.getElementById("kept").textContent.includes("Where does Anna live?")')
        assert page.run('new Set([...document.querySelectorAll("#kept span")].map((one) => one.title)).size') > 1
        assert "held" in page.run('document.getElementById("numbers").textContent')
        assert page.run('document.querySelector("#gauge div").getBoundingClientRect().width') > 0
        for width, height, dark in ((390, 844, False), (390, 844, True), (1280, 800, False), (1280, 800, True)):
            page.screen(width, height, dark=dark)
            assert page.run("document.documentElement.scrollWidth") <= width, "it is scrolled sideways"
            send = page.run('document.getElementById("send").getBoundingClientRect().bottom')
            assert 0 < send <= height, "the button is out of sight"
            page.picture(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")
        page.run('document.getElementById("fresh").click()')
        assert page.run('document.querySelectorAll(".said").length') == 0


def test_a_page_without_a_token_asks_for_one(page, serving):
    with serving(tokens=("anna-token",), reply_tokens=4) as one:
        page.do("Page.navigate", url=one.url)
        page.wait('document.getElementById("token")?.hidden === false')
        page.run('document.getElementById("token").value = "anna-token"')
        page.run(f"({ASK})('Hello')")
        page.wait(DONE.format(1))
        assert page.run('document.getElementById("token").hidden') is True
