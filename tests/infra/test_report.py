"""The report of a task: every figure is on the page, exact, safe to open, and right when the task ended early."""

import copy
import json
import re
from fractions import Fraction
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from infra.report import exact_eth, percent, print_summary, render_html, settlement, short_eth, verdict

SAMPLE = json.loads((Path(__file__).parent / "sample_report.json").read_text(encoding="utf-8"))
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> [bold red]loud[/] {{ 7 * 7 }}"
PUBLISHER = SAMPLE["task"]["publisher"]

NOTHING = {
    "rounds": [],
    "final_accuracy": None,
    "scores": {},
    "rewards_wei": {},
    "aggregator": None,
    "aggregator_reward_wei": 0,
    "refund_wei": 0,
    "escrow_left_wei": 0,
    "gas": {},
    "transactions": [],
    "model_sha256": None,
    "candidate": None,
    "opening_sha256": None,
    "model_uri": None,
    "votes": [],
    "required_votes": None,
    "timeline": [],
    "seconds_per_step": {},
}


@pytest.fixture
def report():
    return copy.deepcopy(SAMPLE)


def early(status, reason, **changes):
    """The sample's task as if it had ended before its first round."""
    changed = {**copy.deepcopy(SAMPLE), **copy.deepcopy(NOTHING), **changes}
    changed["task"] |= {"status": status, "reason": reason, "finished_s": None}
    changed["dataset"]["miners"] = []
    return changed


class Page(HTMLParser):
    """Tags, attributes and text as a browser would read them."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(source)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        self.titles = [value for name, value in self.attributes if name == "title"]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def page_of(report):
    page = Page(render_html(report))
    assert page.open == []
    return page


def summary_of(report, width=100, path=Path("runs/one")):
    console = Console(file=StringIO(), width=width, color_system=None)
    print_summary(report, console, path)
    return console.file.getvalue()


# Every figure


def test_every_round_is_on_the_page(report):
    page = page_of(report)
    for round_ in report["rounds"]:
        assert f"{round_['correct']} / {round_['total']}" in page.text
        assert percent(Fraction(round_["correct"], round_["total"])) in page.text
        assert f"{round_['loss']:.4f}" in page.text
        assert f"{round_['coordinates']:,} of {round_['dimension']:,}" in page.text
        for seconds in round_["seconds"].values():
            assert f"{seconds:,.2f} s" in page.text
        for refusal in round_["refused"]:
            assert refusal["reason"] in page.text
    assert "94% required" in page.text


def test_every_amount_is_on_the_page_to_the_wei(report):
    page = page_of(report)
    amounts = [report["task"]["reward_wei"], report["aggregator_reward_wei"], *report["rewards_wei"].values()]
    for wei in amounts:
        assert f"{wei:,}" in page.text
        assert exact_eth(wei) in page.text
        assert f"{wei} wei" in page.titles


def test_every_score_is_on_the_page_and_an_unrevealed_one_is_named(report):
    page = page_of(report)
    for score in report["scores"].values():
        assert ("not revealed" if score is None else f"{score // 10**6}.{score % 10**6:06d}") in page.text


def test_every_transaction_and_its_gas_is_on_the_page(report):
    page = page_of(report)
    for sent in report["transactions"]:
        assert sent["transaction"] in page.text
        assert sent["sender"] in page.text
        assert f"{sent['gas']:,}" in page.text
        assert str(sent["block_number"]) in page.text
    for kind, spent in report["gas"].items():
        assert kind in page.text
        assert f"{spent['gas']:,}" in page.text
    assert f"{sum(spent['gas'] for spent in report['gas'].values()):,}" in page.text


def test_every_attestation_digest_and_contract_is_on_the_page(report):
    page = page_of(report)
    for vote in report["votes"]:
        assert vote["signature"] in page.text
        assert vote["reason"] in page.text
    accepted = sum(vote["accepted"] for vote in report["votes"])
    assert page.text.count("✓ accepted") == accepted
    assert page.text.count("✗ rejected") == len(report["votes"]) - accepted
    for digest in ("model_sha256", "candidate", "opening_sha256", "model_uri"):
        assert report[digest] in page.text
    assert report["task"]["spec_hash"] in page.text
    for name, address in report["task"]["contracts"].items():
        assert name in page.text
        assert address in page.text


def test_the_data_of_every_miner_is_on_the_page(report):
    page = page_of(report)
    for row in report["dataset"]["miners"]:
        assert f" {row['samples']} " in page.text
        assert f"Samples in each class: {', '.join(map(str, row['histogram']))}" in page.text
        for number, count in enumerate(row["histogram"]):
            assert f"Class {number}: {count}" in page.text


def test_every_step_is_on_the_page_with_start_and_length(report):
    page = page_of(report)
    for step in report["timeline"]:
        assert f"starts at {step['start_s']:,.2f} s, takes {step['seconds']:,.2f} s, {step['outcome']}" in page.text
        assert f"{step['start_s']:,.2f} s" in page.text
        assert step["detail"] in page.text
    for step, seconds in report["seconds_per_step"].items():
        assert step in page.text
        assert f"{seconds:,.2f} s" in page.text


def test_actors_are_named_whatever_the_case_of_the_address(report):
    report["actors"] = {address.lower(): name for address, name in report["actors"].items()}
    assert "miner-1 0x" in page_of(report).text


def test_a_miner_without_a_name_is_shown_by_its_address(report):
    miner = report["dataset"]["miners"][0]["miner"]
    del report["actors"][miner]
    page = page_of(report)
    assert f"{miner[:6]}…{miner[-4:]}" in page.text
    assert miner in page.titles


# Exact numbers


@pytest.mark.parametrize(
    ("wei", "exact", "brief"),
    [
        (0, "0", "0 ETH"),
        (1, "0.000000000000000001", "1 wei"),
        (10**12 - 1, "0.000000999999999999", "999,999,999,999 wei"),
        (10**12, "0.000001", "0.000001 ETH"),
        (15 * 10**17, "1.5", "1.5 ETH"),
        (15 * 10**17 + 7, "1.500000000000000007", "≈1.5 ETH"),
        (1_349_999_999_999_999_999, "1.349999999999999999", "≈1.35 ETH"),
        (2**53 + 1, "0.009007199254740993", "≈0.009007 ETH"),
        (1234 * 10**18 + 1, "1,234.000000000000000001", "≈1,234 ETH"),
    ],
)
def test_amounts(wei, exact, brief):
    assert exact_eth(wei) == exact
    assert short_eth(wei) == brief.replace(" ", "\N{NO-BREAK SPACE}")


def test_an_amount_that_passed_through_a_float_is_refused(report):
    report["task"]["reward_wei"] = 1.5e18
    with pytest.raises(ValueError, match="wei must be an integer"):
        render_html(report)


def test_a_percentage_is_cut_so_it_never_claims_the_requirement():
    assert percent(Fraction(93_999_999, 100_000_000)) == "93.99%"
    assert percent(Fraction(94, 100)) == "94.00%"


@pytest.mark.parametrize(("correct", "word"), [(94, "✓ reached"), (93, "○ below")])
def test_the_requirement_is_compared_with_the_counted_samples(report, correct, word):
    report["rounds"] = [{**report["rounds"][0], "correct": correct, "total": 100, "accuracy": correct / 100}]
    assert word in page_of(report).text


def test_the_settlement_adds_up(report):
    assert settlement(report).is_balanced is True


def test_a_missing_wei_is_reported(report):
    report["aggregator_reward_wei"] -= 1
    assert settlement(report).is_balanced is False
    assert "differ from the reward by 1 wei" in page_of(report).text
    assert "differ from the reward by 1 wei" in summary_of(report)


def test_rewards_that_wait_to_be_withdrawn_are_not_a_difference(report):
    report["escrow_left_wei"] = 5
    assert settlement(report).is_balanced is True
    assert "0.000000000000000005 ETH of it waits to be withdrawn" in page_of(report).text


# Safe to open


def test_nothing_is_loaded_from_elsewhere(report):
    source = render_html(report)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert not {"src", "srcset", "action", "data", "background"} & {name for name, _ in page.attributes}
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", source)


@pytest.mark.parametrize(
    "place",
    [
        lambda r: r["task"].update(name=HOSTILE, reason=HOSTILE, id=HOSTILE, status=HOSTILE),
        lambda r: r["task"].update(contracts={HOSTILE: HOSTILE}, publisher=HOSTILE, spec_hash=HOSTILE),
        lambda r: r.update(actors=dict.fromkeys(r["actors"], HOSTILE)),
        lambda r: r["rounds"][0].update(refused=[{"miner": HOSTILE, "step": HOSTILE, "reason": HOSTILE}]),
        lambda r: r["rounds"][0].update(seconds={HOSTILE: 1.0}),
        lambda r: r["votes"][0].update(reason=HOSTILE, signature=HOSTILE, miner=HOSTILE),
        lambda r: r["timeline"][0].update(actor=HOSTILE, step=HOSTILE, detail=HOSTILE, module=HOSTILE, outcome=HOSTILE),
        lambda r: r.update(model_uri="javascript:alert(1)", model_sha256=HOSTILE, candidate=HOSTILE),
        lambda r: r["dataset"].update(name=HOSTILE),
        lambda r: r.update(gas={HOSTILE: {"transactions": 1, "gas": 1}}, seconds_per_step={HOSTILE: 1.0}),
        lambda r: r["transactions"][0].update(kind=HOSTILE, sender=HOSTILE, transaction=HOSTILE),
    ],
)
def test_a_hostile_string_stays_text(report, place):
    clean = page_of(report).tags
    place(report)
    page = page_of(report)
    assert {"script", "img"}.isdisjoint(page.tags)
    assert set(page.tags) <= set(clean)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    summary_of(report)


def test_a_hostile_string_is_shown_as_it_is_in_the_terminal(report):
    report["task"]["reason"] = "[bold]x[/bold] [link=evil]y[/link]"
    assert "[bold]x[/bold] [link=evil]y[/link]" in summary_of(report)


def test_a_hostile_string_does_not_steer_the_terminal(report):
    report["task"].update(reason="\x1b[2Jgone\r\u202eback", name="\x1b]0;owned\x07", status="\x1b[31m")
    report["actors"] = dict.fromkeys(report["actors"], "\x1b[8mhidden")
    report["gas"] = {"\x1b[1A": {"transactions": 1, "gas": 1}}
    text = summary_of(report)
    assert all(letter.isprintable() or letter in "\n\N{NO-BREAK SPACE}" for letter in text)
    assert "hidden" in text


# Readable by everybody


def test_every_chart_has_words(report):
    source = render_html(report)
    for svg in re.findall(r'<svg[^>]*role="img"[^>]*>', source):
        assert "aria-label" in svg
    hidden = re.findall(r'<svg(?![^>]*(?:role="img"|aria-hidden="true"|y="12"))[^>]*>', source)
    assert hidden == []


def test_the_page_follows_the_reader(report):
    source = render_html(report)
    for feature in (
        "prefers-color-scheme: dark",
        "@media print",
        "width=device-width",
        'lang="en"',
        "overflow-x: auto",
    ):
        assert feature in source


# Ended early


EARLY = {
    "failed in M1": (early("FAILED", "the wallet is empty"), "nothing was locked, nothing was paid"),
    "open": (early("OPEN", "", escrow_left_wei=SAMPLE["task"]["reward_wei"]), "waits for its cohort"),
    "too few miners": (
        early(
            "REFUNDABLE",
            "only 2 miners were verified",
            escrow_left_wei=SAMPLE["task"]["reward_wei"],
            transactions=SAMPLE["transactions"][:1],
        ),
        "once the deadline has passed (2025-11-22 01:00:00 UTC)",
    ),
    "refunded in M2": (
        early(
            "REFUNDED",
            "the deadline passed",
            refund_wei=SAMPLE["task"]["reward_wei"],
            transactions=SAMPLE["transactions"][:1],
        ),
        "≈1.5 ETH went back to the publisher",
    ),
    "training": (
        early("TRAINING", "", rounds=SAMPLE["rounds"][:1], escrow_left_wei=SAMPLE["task"]["reward_wei"]),
        "1 round so far",
    ),
    "published": (
        early(
            "PUBLISHED",
            "",
            rounds=SAMPLE["rounds"],
            final_accuracy=SAMPLE["final_accuracy"],
            escrow_left_wei=SAMPLE["task"]["reward_wei"],
        ),
        "once accuracy and scores are revealed",
    ),
}


@pytest.mark.parametrize(("report", "sentence"), EARLY.values(), ids=EARLY)
def test_a_task_that_ended_early_says_so(report, sentence):
    page = page_of(report)
    for text in (page.text, re.sub(r"\s+", " ", summary_of(report))):
        assert sentence in text
        assert report["task"]["reason"] in text
        assert "None" not in text
        assert "nan" not in text.split()
    assert "No miner registered data" in page.text
    assert settlement(report).is_balanced is not False


def test_a_round_without_a_model_breaks_the_curve(report):
    report["rounds"][1] |= {"accuracy": None, "correct": None, "total": None, "loss": None}
    source = render_html(report)
    assert "✗ no model" in source
    assert source.count('class="curve"') == 0


def test_the_curve_joins_neighbouring_rounds(report):
    assert render_html(report).count('class="curve"') == len(report["rounds"]) - 1


def test_the_best_round_is_told_when_no_model_was_accepted(report):
    report.update(final_accuracy=None, refund_wei=report["task"]["reward_wei"])
    report.update(rewards_wei={}, scores={}, aggregator_reward_wei=0, votes=[])
    report["rounds"] = report["rounds"][:2]
    report["task"]["status"] = "REFUNDED"
    assert verdict(report).sentence.startswith("The best round reached 91.94% (331 of 360), with 94% required.")
    assert "Best accuracy" in page_of(report).text


@pytest.mark.parametrize("key", sorted(SAMPLE))
@pytest.mark.parametrize("how", ["absent", "null", "empty"])
def test_any_part_may_be_missing(report, key, how):
    if how == "absent":
        del report[key]
    else:
        report[key] = type(report[key])() if how == "empty" and isinstance(report[key], dict | list) else None
    assert page_of(report).text
    assert summary_of(report)


@pytest.mark.parametrize("part", ["votes", "transactions", "timeline", "rounds"])
def test_rows_may_lack_every_field(report, part):
    report[part] = [{}]
    assert page_of(report).text
    assert summary_of(report)


def test_an_empty_report_is_still_a_page():
    assert "does not say how the task ended" in page_of({}).text
    assert "does not say how the task ended" in summary_of({})


# The terminal


def test_the_summary_tells_what_happened(report):
    text = summary_of(report)
    assert "✓ Paid" in text
    for round_ in report["rounds"]:
        assert f"{round_['correct']}/{round_['total']}" in text
    for wei in [*report["rewards_wei"].values(), report["aggregator_reward_wei"], report["task"]["reward_wei"]]:
        assert exact_eth(wei) in text
    for kind, spent in report["gas"].items():
        assert kind in text
        assert f"{spent['gas']:,}" in text
    for step, seconds in report["seconds_per_step"].items():
        assert step in text
        assert f"{seconds:.2f} s" in text


@pytest.mark.parametrize("width", [80, 100])
def test_the_summary_fits(report, width):
    report["actors"][PUBLISHER] = "p" * 300
    report["actors"][report["dataset"]["miners"][0]["miner"]] = "m" * 300
    lines = summary_of(report, width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(re.fullmatch(r"\s*m+\s*", line) for line in lines)


@pytest.mark.parametrize("path", ["runs/one", "runs/one/report.json", "runs/one/report.html"])
def test_the_summary_names_both_files_on_unbroken_lines(report, path):
    deep = Path("a" * 90) / path
    lines = summary_of(report, 80, deep).splitlines()
    folder = Path("a" * 90) / "runs" / "one"
    assert f"Page  {folder / 'report.html'}" in lines
    assert f"Data  {folder / 'report.json'}" in lines
