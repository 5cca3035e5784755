"""The latent browser in a real browser: Debian's Chromium, headless, driven through Playwright; skipped where it is missing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from steerscale.cli import main
from steerscale.interp.features import decoder_neighbours, token_effects
from steerscale.interp.latent_index import LatentIndex, build_index
from steerscale.interp.latent_page import Heading, latent_page
from steerscale.language_model import LanguageModel
from steerscale.parallel.context import initialize
from steerscale.parallel.layout import ParallelLayout
from steerscale.sae.formats import write_sae
from steerscale.testing.ranks import RankPool
from steerscale.tokenizers.display import token_texts
from steerscale.tokenizers.huggingface import HuggingFaceTokenizer
from tests.interp.saes import random_sae
from tests.models.gpts import GPT2, build_random
from tests.sae.training import HOOK, language_model
from tests.sae.training import MODEL as TRAINED
from tests.train.runs import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "{{SCRIPT}}",
    "&lt;b&gt;",
    "\u2028'\"\\",
)
LATENTS, LENGTH = 12_000, 12
ROWS = "#spacer .row"


class Made(NamedTuple):
    """A page, and what it is of."""

    path: Path
    index: LatentIndex
    words: list[str]
    promoted: list[list[int]]
    neighbours: list[list[int]]


def hostile_tokenizer() -> HuggingFaceTokenizer:
    """A word a token; some would be markup if anything took them for it."""
    words = [f"Wort{number}" for number in range(61)]
    words[: len(HOSTILE) + 1] = ["<end>", *HOSTILE]
    model = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<end>", "special": True, "single_word": False, "lstrip": False}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(words)},
            "unk_token": "<end>",
        },
    }
    model["added_tokens"][0] |= {"rstrip": False, "normalized": False}
    return HuggingFaceTokenizer(json.dumps(model).encode(), {"eos_token": "<end>"}, origin="test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A page of 12,000 latents, two thirds of them dead."""
    sae, tokenizer = random_sae(GPT2.d_model, latents=LATENTS), hostile_tokenizer()
    assert sae.b_enc is not None
    sae.b_enc[torch.arange(LATENTS) % 3 != 0] = -1e6
    text = torch.randint(61, (8, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    with initialize(ParallelLayout()) as context:
        lm = LanguageModel(build_random(GPT2, context), context)
        index = build_index(lm, sae, [text], num_top=6, num_drawn=1, width=4)
        effects = token_effects(lm, sae, index.latents, 5)
        neighbours = decoder_neighbours(sae, 3, context.device)
    heading = Heading(name=HOSTILE[0], model="<i>m</i>", hook="h", architecture="relu", text=HOSTILE[1])
    path = tmp_path_factory.mktemp("page") / "latents.html"
    path.write_text(latent_page(heading, index, effects, neighbours, tokenizer), encoding="utf-8")
    words = [text for text, _ in token_texts(tokenizer, range(61))]
    return Made(path, index, words, effects[0].tokens_JC.tolist(), neighbours[0].tolist())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with sync_playwright() as playwright:
        # Root needs no sandbox of its own: it opens nothing but files that these tests wrote.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, path: Path, address: str = "") -> tuple[Page, list[str]]:
    """The page once it is ready; errors, console messages, dialogs and requests elsewhere, as they come."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith("file:") else troubles.append(request.url))
    page.goto(path.as_uri() + address)
    page.wait_for_selector("body[data-ready]")
    return page, troubles


@pytest.fixture
def page(browser: Browser, made: Made) -> Iterator[Page]:
    """The page, opened. Afterwards: no errors, no requests."""
    page, troubles = open_page(browser, made.path)
    yield page
    page.close()
    assert troubles == []


def listed(page: Page) -> list[int]:
    """Latents of the rows that stand in the document, from the top."""
    rows = page.locator(ROWS).evaluate_all("rows => rows.map((row) => [parseFloat(row.style.top), row.dataset.latent])")
    return [int(latent) for _, latent in sorted(rows)]


def ask(page: Page, query: str, scope: str = "contexts") -> list[int]:
    """Search; the latents that are shown."""
    page.select_option("#scope", scope)
    page.fill("#query", query)
    page.wait_for_timeout(300)  # the page waits for the end of typing
    return listed(page)


@needs_browser
def test_page_shows_a_latent_as_the_index_has_it(page: Page, made: Made) -> None:
    index = made.index
    expect(page.locator("#about")).to_contain_text("12,000 latents of a relu SAE at h")
    latent = int(index.active_J.argmax())
    ask(page, f"#{latent}")
    assert listed(page) == [latent]
    expect(page.locator("#latent h2")).to_contain_text(f"Latent {latent}")
    facts = page.locator("#latent dd").all_inner_texts()
    assert facts[1] == f"{int(index.active_J[latent])} tokens"
    assert float(facts[3]) == pytest.approx(float(index.largest_J[latent]), rel=1e-3)
    values = page.locator(".contexts.top .context > span").all_inner_texts()
    tops = [value for value in index.top.value_GK[latent].tolist() if value > 0]
    assert [float(value) for value in values] == pytest.approx(tops, rel=1e-3)
    row, at = divmod(int(index.top.position_GK[latent, 0]), LENGTH)
    tokens = page.locator(".contexts.top .context").first.locator(".tokens span")
    expected = index.tokens_RS[row, max(at - 4, 0) : at + 5].tolist()
    assert tokens.all_text_contents() == [made.words[token] for token in expected]
    expect(page.locator(".contexts.top .peak").first).to_have_text(made.words[int(index.tokens_RS[row, at])])
    lit = sum(float(value) > 0 for value in index.top.window_GKW[latent, 0])
    assert page.locator(".contexts.top .context").first.locator(".tokens span[title]").count() == lit
    assert page.locator(".contexts.drawn .context").count() == int((index.drawn.position_GK[latent] >= 0).sum())
    titles = page.locator("#values rect title").all_text_contents()
    assert sum(int(title.split()[0]) for title in titles) == int(index.active_J[latent])
    promoted = page.locator("#promoted > span").evaluate_all(
        "chips => chips.map((chip) => chip.firstChild.textContent)"
    )
    assert promoted == [made.words[token].strip(" ") for token in made.promoted[latent]]
    page.locator("#neighbours a").nth(1).click()
    expect(page.locator("#latent h2")).to_contain_text(f"Latent {made.neighbours[latent][1]}")


@needs_browser
def test_sorting_is_of_all_latents_and_dead_ones_can_be_hidden(page: Page, made: Made) -> None:
    active, largest = made.index.active_J, made.index.largest_J
    page.click("#heads [data-sort=density]")
    shown = listed(page)
    assert [int(active[latent]) for latent in shown] == active.sort(descending=True).values[: len(shown)].tolist()
    page.select_option("#sort", "max")
    assert listed(page)[0] == int(largest.argmax())
    page.check("#alive")
    page.click("#direction")
    shown = [float(largest[latent]) for latent in listed(page)]
    assert shown == sorted(shown)
    assert shown[0] == float(largest[active > 0].min())
    expect(page.locator("#count")).to_have_text(f"{int((active > 0).sum())} of {LATENTS}")


@needs_browser
def test_search_finds_contexts_tokens_and_effects(page: Page, made: Made) -> None:
    index, word = made.index, 33
    positions = index.top.position_GK
    peaks = torch.where(positions >= 0, index.tokens_RS.flatten()[positions.clamp_min(0)], -1)
    expected = (peaks == word).any(dim=1).nonzero().flatten().tolist()
    ask(page, "WORT33", "peak")
    expect(page.locator("#count")).to_have_text(f"{len(expected)} of {LATENTS}")
    best = (peaks == word).sum(dim=1)
    assert int(best[listed(page)[0]]) == int(best.max())
    # In the contexts: at most four tokens away, in the same sequence.
    touched = torch.nn.functional.pad((index.tokens_RS == word).float(), (4, 4)).unfold(1, 9, 1).amax(dim=-1).flatten()
    near = torch.where(positions >= 0, touched[positions.clamp_min(0)], 0).amax(dim=1)
    ask(page, "wort33")
    expect(page.locator("#count")).to_have_text(f"{int(near.sum())} of {LATENTS}")
    ask(page, "wort33", "promoted")
    expect(page.locator("#count")).to_have_text(f"{sum(word in tokens for tokens in made.promoted)} of {LATENTS}")
    ask(page, "nothing like this")
    expect(page.locator("#count")).to_have_text(f"0 of {LATENTS}")
    assert listed(page) == []
    ask(page, "")
    expect(page.locator("#count")).to_have_text(str(LATENTS))


@needs_browser
def test_list_of_12000_latents_has_few_rows_wherever_it_is_scrolled(page: Page) -> None:
    for share in (0, 0.1, 0.35, 0.8, 1):
        page.locator("#list").evaluate("(list, share) => { list.scrollTop = share * list.scrollHeight; }", share)
        middle = round(share * (LATENTS - 1))
        near = f"rows => rows.some((row) => Math.abs(row.dataset.latent - {middle}) < 25)"
        # Not wait_for_function: it looks again by an eval, which the page's policy forbids.
        while not page.locator(ROWS).evaluate_all(near):
            page.wait_for_timeout(20)
        assert 10 < page.locator(ROWS).count() < 80
    assert listed(page)[-1] == LATENTS - 1


@needs_browser
def test_keys_move_through_the_list_and_links_open_what_was_seen(page: Page, browser: Browser, made: Made) -> None:
    page.focus("#list")
    page.keyboard.press("End")
    expect(page.locator("#latent h2")).to_contain_text(f"Latent {LATENTS - 1}")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#latent h2")).to_contain_text(f"Latent {LATENTS - 2}")
    expect(page.locator(f"#row-{LATENTS - 2}")).to_be_in_viewport()
    ask(page, "wort7")
    page.check("#alive")
    page.click("#heads [data-sort=effect]")
    page.locator(ROWS).nth(2).click()
    expect(page.locator("#latent h2")).to_contain_text(f"Latent {listed(page)[2]}")
    chosen, shown = page.locator("#latent h2").inner_text(), listed(page)
    other, troubles = open_page(browser, made.path, page.evaluate("location.hash"))
    assert other.locator("#latent h2").inner_text() == chosen
    assert set(listed(other)) & set(shown)
    assert other.input_value("#query") == "wort7"
    other.evaluate("location.hash = 'latent=5'")
    expect(other.locator("#latent h2")).to_contain_text("Latent 5")
    expect(other.locator("#count")).to_have_text(str(LATENTS))
    other.close()
    for address in ("#latent=99999999&sort=__proto__&in=x", "#latent=-1&sort=", "#%%%"):
        other, troubles = open_page(browser, made.path, address)
        expect(other.locator("#latent h2")).to_contain_text("Latent 0")
        other.close()
        assert troubles == []


@needs_browser
def test_text_is_never_markup(page: Page, browser: Browser, made: Made) -> None:
    raw = made.path.read_text(encoding="utf-8")
    assert not any(text in raw for text in (*HOSTILE, "Wort7", "<i>m</i>"))
    expect(page.locator("#name")).to_have_text(HOSTILE[0])
    expect(page.locator("#about")).to_contain_text(HOSTILE[1])
    for token in range(1, 1 + len(HOSTILE)):
        ask(page, made.words[token], "peak")
        page.locator(ROWS).first.click()
        expect(page.locator(".peak", has_text=made.words[token].strip()).first).to_be_visible()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    other, troubles = open_page(browser, made.path)
    fetched = other.evaluate("() => fetch('https://example.invalid').then(() => 'open', () => 'blocked')")
    other.close()
    assert fetched == "blocked"
    assert "Content Security Policy" in troubles[0]


def test_token_texts_are_what_decoding_makes_of_tokens() -> None:
    texts = token_texts(hostile_tokenizer(), range(63))
    assert texts[0] == ("<end>", False)
    assert texts[7] == ("Wort7", True)
    assert texts[61:] == [("<61>", False), ("<62>", False)]


@pytest.fixture(scope="module")
def lm_run(pool: RankPool, german_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours."""
    run_dir = language_model(german_data, tmp_path_factory.mktemp("browse") / "lm")
    pool.run(train, run_dir, ranks=1)
    return run_dir


def test_browse_command_writes_a_page(
    lm_run: Path, german_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae(random_sae(TRAINED.d_model, hook=HOOK), tmp_path / "sae")
    what = ["sae", "browse", str(tmp_path / "sae"), "--model", str(lm_run)]
    page = tmp_path / "latents.html"
    assert main([*what, "--text", str(german_data), "--samples", "9", "-o", str(page)]) == 0
    assert "tokens read, " in capsys.readouterr().err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    for wrong, message in (
        (["-o", str(page)], "--text"),
        (["-o", str(tmp_path / "none" / "x.html"), "--text", str(german_data)], "create it first"),
        (["-o", str(page), "--contexts", "0"], "--contexts must be"),
        (["-o", str(page), "--neighbours", "-1"], "--neighbours must not"),
    ):
        assert main([*what, *wrong]) == 2
        assert message in capsys.readouterr().err
