"""The page in a real browser: it draws what is embedded, says what it should at a token, and reports no error.

    apt-get install chromium; pip install playwright    # no browser of playwright's own
    python -m pytest -m browser tests/test_page_browser.py

CHROMIUM names another executable. SCREENSHOTS names a folder that gets a picture of each test.
"""

import json
import os
import shutil

import pytest
from datasets import concatenate_datasets

from hf_distill import KDConfig, KDTrainer
from hf_distill.page import page_of, write_page
from hf_distill.token_comparison import compare_tokens
from hf_distill.token_data import comparison_data
from tests.test_page import EVIL, HISTORY, MEASURES, answers_of, run_of, tokens_of
from tests.trainers.test_kd import settings
from tests.vision import chats, make_processor, make_vlm

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# The height of an element's text alone.
HEIGHT = """element => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return range.getBoundingClientRect().height;
}"""
SIZES = {"desktop": (1280, 900), "phone": (375, 740)}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium, or name it in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path, request):
    """A function that opens a page; at the end nothing has failed in it, and nothing was asked of a network."""
    problems, contexts = [], []

    def open_page(runs, size="desktop", theme="light"):
        path = tmp_path / "report.html"
        if isinstance(runs, dict):
            write_page(path, page_of(runs))
        else:
            path = runs
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda asked: None if asked.url.startswith(("file:", "data:")) else problems.append(asked.url)
        )
        page.goto(path.as_uri())
        return page

    yield open_page
    if folder := os.environ.get("SCREENSHOTS"):
        for i, context in enumerate(contexts):
            context.pages[0].screenshot(path=f"{folder}/{request.node.name}-{i}.png")
    for context in contexts:
        context.close()
    assert problems == []


def one_run():
    """A run of two rows: numbers that tell tokens apart."""
    tokens = tokens_of(num_rows=2, num_tokens=4, texts=("one", " two", " three", " four", "five", "six"))
    first, second = (json.loads(json.dumps(row)) for row in tokens["rows"])
    first |= {"kl": [0.01, 0.3, 2.5]}
    second |= {"kl": [0.02, 0.02, 0.02], "tokens": [4, 5, 0, 1]}
    first["student"] = {
        "ids": [0, 1, 2, 3, 4] * 2 + [1, 0, 2, 3, 4],
        "probs": [612, 200, 100, 50, 0] * 3,
        "own": [1, 2, 3],
    }
    first["teacher"] = {
        "ids": [0, 1, 2, 3, 4] * 3,
        "probs": [600, 200, 100, 50, 10] * 2 + [905, 40, 3, 2, 1],
        "own": [4, 5, 6],
    }
    return run_of(tokens={**tokens, "rows": [second, first]})


def spans(page):
    return page.locator(".row .t")


def test_pointing_at_a_token_shows_what_both_sides_expected(opened):
    page = opened({"run": one_run()})
    assert page.title() == "run · hf_distill report"
    assert page.locator(".row").count() == 2
    assert "worst 2.50" in page.locator(".row").first.inner_text()  # the row with the largest mean comes first
    worst = spans(page).nth(2)
    assert worst.inner_text() == " four"
    assert set(worst.get_attribute("class").split()) == {"t", "k5", "d"}
    worst.hover()
    detail = page.locator("#detail")
    text = detail.inner_text()
    assert "KL to the teacher: 2.50 nats" in text
    assert "student 0.3 %, teacher 0.6 %" in text
    student, teacher = (detail.locator(f".{side} li").all_inner_texts() for side in ("student", "teacher"))
    assert [" ".join(line.split()) for line in student] == [
        "␣two 61.2 %",
        "one 20.0 %",
        "␣three 10.0 %",
        "␣four ✓ 5.0 %",
        "five < 0.1 %",
    ]
    assert " ".join(teacher[0].split()) == "one 90.5 %"
    page.mouse.move(0, 0)
    page.locator("h1").hover()
    assert detail.is_hidden()


def test_a_pressed_token_stays_until_escape(opened):
    page = opened({"run": one_run()})
    spans(page).nth(1).click()
    spans(page).nth(0).hover()
    assert "0.30 nats" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()


def test_tokens_are_reached_by_keyboard_alone(opened):
    page = opened({"run": one_run()})
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('t')"):
            break
    assert "0.0100 nats" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "2.50 nats" in page.locator("#detail").inner_text()
    assert "four, 2.50 nats; student ␣two 61.2 %, teacher one 90.5 %" in page.locator("#spoken").inner_text()
    page.keyboard.press("Home")
    assert "0.0100 nats" in page.locator("#detail").inner_text()
    page.keyboard.press("Tab")  # one stop for a row
    assert page.evaluate("document.activeElement.closest('.row') === document.querySelectorAll('.row')[1]")


def test_filters_search_and_order_choose_rows_and_tokens(opened):
    page = opened({"run": one_run()})
    page.get_by_label("the most likely token differs").check()
    assert page.locator(".row").count() == 1
    assert page.locator(".hit").all_inner_texts() == [" four"]
    page.get_by_label("the teacher is sure").check()
    assert page.locator(".hit").count() == 1
    page.get_by_label("the most likely token differs").uncheck()
    page.get_by_label("the teacher is sure").uncheck()
    page.get_by_label("Search the rows").fill("FIVE")
    assert [text.strip() for text in page.locator(".row .line").all_inner_texts()] == ["fivesixone two"]
    assert "1 of 2 rows" in page.locator("[role=status]").inner_text()
    page.get_by_label("Search the rows").fill("")
    page.get_by_label("Order", exact=True).select_option(label="order of the data")
    assert "Row 0:" in page.locator(".row").first.inner_text()


def test_a_filter_leaves_what_the_teacher_has_right_and_the_student_has_not(opened):
    run = one_run()
    first = run.tokens["rows"][1]
    first["teacher"]["ids"][10:] = [3, 1, 2, 0, 4]  # " four", as the row has it
    page = opened({"run": run})
    page.get_by_label("the teacher is right, the student is not").check()
    assert page.locator(".hit").all_inner_texts() == [" four"]
    cells = page.get_by_role("row", name="the teacher is right, the student is not").locator("td").all_inner_texts()
    assert "1" in cells  # of both rows' tokens; where both are right, nothing is missed
    assert page.locator("#where ~ div td.number").first.inner_text() == "0"  # the row of the worst token


def test_a_token_that_comes_again_after_the_same_text_is_one_of_the_worst(opened):
    run = one_run()
    first = run.tokens["rows"][1]
    other_end = {**first, "number": 7, "kl": [0.01, 0.4, 1.5], "tokens": [*first["tokens"][:3], 4]}
    run.tokens["rows"] += [other_end, {**first, "number": 8, "kl": [0.0, 0.2, 1.0]}]
    page = opened({"run": run})
    rows = page.locator("#where ~ div table").first.locator("tbody tr").all()
    # nats, the row, how often, the text: " two" after "one" is in three rows, " three" and " four" in both ways.
    found = [[cell.inner_text() for cell in row.locator("td").all()[:4]] for row in rows]
    assert found[:4] == [
        ["2.50", "0", "2", "one two three␣four"],
        ["1.50", "7", "1", "one two threefive"],
        ["0.40", "7", "3", "one two␣three"],
        ["0.02", "1", "1", "fivesix"],
    ]
    assert len(found) == 7
    rows[0].locator("button").click()
    assert "2.50 nats" in page.locator("#detail").inner_text()


def test_a_worst_token_leads_to_its_row(opened):
    page = opened({"run": one_run()})
    page.locator("#where ~ div button").first.click()
    assert "2.50 nats" in page.locator("#detail").inner_text()
    assert page.locator(".t.on").inner_text() == " four"


def test_a_worst_token_is_reached_by_keyboard_and_keeps_the_focus(opened):
    page = opened({"run": one_run()})
    page.locator("#where ~ div button").first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == " four"
    assert page.locator(".line").first.locator("[tabindex='0']").count() == 1
    page.keyboard.press("ArrowLeft")
    assert "0.30 nats" in page.locator("#detail").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()


def test_text_of_rows_is_text_and_runs_from_right_to_left_where_it_does(opened):
    texts = (EVIL, "\u05e9\u05dc\u05d5\u05dd", " \u05e2\u05d5\u05dc\u05dd", "<b>x</b>", "e", "f")
    tokens = tokens_of(num_rows=1, texts=texts)
    right_to_left = {**tokens["rows"][0], "number": 1, "tokens": [1, 2, 1, 2]}
    tokens["rows"] = [tokens["rows"][0], right_to_left]
    page = opened({EVIL: run_of(settings={"model": EVIL}, recorded={"warnings": [EVIL]}, tokens=tokens)})
    assert "broken" not in page.title().replace(EVIL, "")
    assert "x" not in page.locator("main b").all_inner_texts()
    assert page.locator(".line").first.text_content().startswith(EVIL)
    lines = page.locator(".line")
    assert lines.nth(1).evaluate("line => getComputedStyle(line).direction") == "rtl"
    first, second = (lines.nth(1).locator("span").nth(i).bounding_box() for i in (0, 1))
    assert second["x"] < first["x"]


@pytest.mark.parametrize("size", SIZES)
def test_generated_answers_stand_side_by_side(opened, size):
    answers = answers_of([(1, 1), (0, 1)])
    answers[1]["student"]["text"] = EVIL
    page = opened({"run": one_run()._replace(answers=answers)}, size)
    cells = page.locator("#texts + .scroll tbody tr").first.locator("td").all_inner_texts()
    assert cells[:2] == ["Question 1?", "1"]
    assert cells[2].startswith("[0] </script><script>")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_screen_in_both_themes(opened, size, theme):
    results = {"before": MEASURES, "after": MEASURES | {"kl": 0.25}}
    history = [*HISTORY, *({"step": i, "ce": 3 / i, "kd": 2 / i, "agreement": 0.5} for i in range(11, 40))]
    page = opened({"run": one_run()._replace(results=results, history=history)}, size, theme)
    width = SIZES[size][0]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    spans(page).nth(2).click()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    one_line = page.locator("#detail").evaluate("detail => parseFloat(getComputedStyle(detail).lineHeight)")
    for number in [*page.locator(".number:visible").all(), *page.locator("td button").all()]:
        assert number.evaluate(HEIGHT) < 1.5 * one_line, number.inner_text()


@pytest.fixture(scope="module")
def with_pictures(tmp_path_factory):
    """A run on rows with one, two and six pictures, of which the tokens are those of real models."""
    folder = tmp_path_factory.mktemp("run")
    rows = concatenate_datasets([chats(1, seed=20 * n, pictures=n) for n in (1, 2, 6)])
    trainer = KDTrainer(
        make_vlm("idefics3", 1), make_vlm("idefics3", 2), KDConfig(**settings(folder)), train_dataset=chats(2),
        eval_dataset=rows, processing_class=make_processor("idefics3"),
    )  # fmt: skip
    own = {"collator": trainer.collated, "spans": trainer.picture_spans}
    found = compare_tokens(trainer.student, trainer.teacher, rows, trainer.tokenizer, **own)
    return run_of(tokens=json.loads(json.dumps(comparison_data(found))))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_stand_above_their_tokens(opened, with_pictures, size, theme):
    page = opened({"run": with_pictures}, size, theme)
    page.get_by_label("Order", exact=True).select_option(label="order of the data")
    rows = page.locator(".row").all()
    assert [row.locator("img").count() for row in rows] == [1, 2, 4]
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    for number, row in enumerate(rows):
        line = row.locator(".line").bounding_box()
        for place, image in enumerate(row.locator("img").all()):
            assert image.evaluate("image => image.complete && image.naturalWidth") == 32
            assert image.get_attribute("alt") == f"picture {place + 1} of row {number}"
            box = image.bounding_box()
            assert box["width"] == box["height"] >= 64
            assert box["y"] + box["height"] <= line["y"]
            assert box["x"] + box["width"] <= SIZES[size][0]
        assert row.locator(".line").inner_text().startswith("<|user|>[picture]what")
        assert "[picture]" not in row.locator(".t").all_inner_texts()  # it bears no label
    assert [row.locator(".pictures").inner_text() for row in rows] == ["", "", "and 2 more"]
    rows[0].locator(".t").nth(2).click()
    assert "KL to the teacher" in page.locator("#detail").inner_text()
    rows[2].scroll_into_view_if_needed()


def test_runs_stand_side_by_side(opened):
    other = one_run()
    other.tokens["rows"][1]["kl"] = [0.01, 0.02, 0.03]
    page = opened({"a": one_run(), "b": other})
    # The run that is closer to its teacher is looked at first.
    chosen = page.locator("select").evaluate_all("all => all.map(one => one.selectedOptions[0].text)")
    assert chosen[:2] == ["b", "b"]
    assert "0.0200 nats" in page.locator("#where ~ div p").nth(1).inner_text()
    page.get_by_label("Run", exact=True).select_option(label="a")
    assert page.get_by_label("Order and filters by").evaluate("one => one.selectedOptions[0].text") == "a"
    assert page.locator("#where ~ div button").first.inner_text() == "2.50"
    lines = page.locator(".row").first.locator(".line")
    assert lines.count() == 2
    names = page.locator(".row").first.locator(".name").all_inner_texts()
    assert names == ["a, mean KL 0.937, worst 2.50", "b, mean KL 0.020, worst 0.03"]
    lines.nth(1).locator(".t").nth(2).hover()
    assert "b, KL to the teacher: 0.0300 nats" in page.locator("#detail").inner_text()
    page.get_by_label("Order and filters by").select_option(label="b")
    assert page.get_by_label("Run", exact=True).evaluate("one => one.selectedOptions[0].text") == "b"
    page.get_by_label("Order", exact=True).select_option(label="difference between the runs")
    assert "Row 0" in page.locator(".row").first.inner_text()


def test_a_curve_says_its_values_at_the_pointer_and_by_keyboard(opened):
    page = opened({"run": one_run()})
    figure = page.locator("figure").first
    svg = figure.locator("svg").first
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    assert "step 5" in figure.inner_text()
    assert "4" in figure.locator(".legend li").first.inner_text().split()
    svg.focus()
    page.keyboard.press("ArrowLeft")
    assert "step 0" in figure.inner_text() or "step 5" in figure.inner_text()


def test_a_curve_without_a_value_at_a_step_says_of_which_step_it_shows_one(opened):
    history = [{"step": 0, "eval_ce": 6.0}, {"step": 5, "ce": 4.0}, {"step": 10, "ce": 3.5, "eval_ce": 3.75}]
    page = opened({"run": one_run()._replace(history=history)})
    figure = page.locator("figure").first
    figure.locator("svg").first.focus()
    values = []
    for _ in history:
        page.keyboard.press("ArrowRight")
        values.append(figure.locator(".legend li").all_inner_texts())
    said = [[" ".join(line.split()) for line in lines[:2]] for lines in values]
    assert said == [
        ["training -", "held-out 6"],
        ["training 4", "held-out 6 (step 0)"],
        ["training 3.5", "held-out 3.75"],
    ]


def test_a_run_without_a_teacher_speaks_of_surprise(opened):
    tokens = one_run().tokens
    unknown = {"ids": [-1] * 15, "probs": [0] * 15, "own": [None] * 3}
    rows = [{**row, "surprise": row["kl"], "teacher": unknown} for row in tokens["rows"]]
    for row in rows:
        del row["kl"]
    page = opened({"run": run_of(tokens={**tokens, "kl_is": None, "rows": rows})})
    text = page.locator("main").inner_text()
    for words in ("Where the surprise is", "Half of the surprise is in 1 of 6", "to see what the student expected"):
        assert words in text
    for words in ("teacher expects", "not known", "distance"):
        assert words not in text
    spans(page).nth(2).click()
    assert "The token itself: student 0.3 %." in page.locator("#detail").inner_text()


def test_the_writer_of_a_generated_token_stands_in_its_panel(opened):
    tokens = one_run().tokens
    for row, marks in zip(tokens["rows"], ("sss", "dcg"), strict=True):
        row["marks"] = marks
    page = opened({"run": run_of(tokens=tokens)})
    text = page.locator("main").inner_text()
    assert "A token with a line above is the teacher's correction" in text
    assert "those at temperature 1" in text
    said = []
    for i in range(4):
        spans(page).nth(i).click()
        said.append(page.locator("#detail p").nth(2).inner_text())
    assert said == [
        "Who wrote it: the student, and the teacher accepted it.",
        "Who wrote it: the teacher, as its correction.",
        "Who wrote it: the data.",
        "Who wrote it: the student.",
    ]


def test_a_control_character_is_visible_where_a_token_stands_alone(opened):
    tokens = one_run().tokens
    page = opened({"run": run_of(tokens={**tokens, "texts": ["\x0c", *tokens["texts"][1:]]})})
    spans(page).nth(2).click()
    assert page.locator("#detail .teacher li").first.inner_text().split() == ["\u240c", "90.5", "%"]


def test_the_columns_of_the_results_are_explained(opened):
    page = opened({"run": one_run()})
    summary = page.get_by_text("What the columns mean")
    terms = page.locator("details:has(summary:text('What the columns mean')) dt")
    assert not terms.first.is_visible()
    summary.click()
    assert terms.all_inner_texts() == ["perplexity", "KL, nats", "agreement", "acceptance"]
