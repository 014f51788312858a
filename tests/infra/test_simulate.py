"""The simulation: its money is the contracts', its rounds are the steps', and the same seed gives the same report."""

import json
import xml.etree.ElementTree as ET
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from contracts.bindings import Offence
from contracts.messages import score_commit
from contracts.task_spec import TaskFile, load_task_file
from infra import cli, economy, simulation_page
from infra.population import CHARACTERS, HONEST, InvalidSetting, Settings, populate
from infra.simulate import plain_sum, ready_sets
from infra.virtual_task import CONTRACTS_ADMIT, Memories, form, play, simulate_task
from tasks.contribute import local_round, order_of_samples
from tasks.global_model import initial_model, next_model
from tasks.learning.compression import SCORE_UNIT, Memory
from tasks.publish import largest_score
from tests.contracts.world import PENALTY_PPM, PUBLISH_WINDOW, REWARD, SCORE_WINDOW, TASK, World, salt_of

AMOUNTS = st.lists(st.integers(0, 10**20), min_size=1, max_size=30)


def task_file() -> TaskFile:
    """Breast cancer in one epoch a round."""
    file = load_task_file((files("deployments") / "ready" / "breast-cancer.toml").read_text())
    return file.model_copy(update={"training": file.training.model_copy(update={"local_epochs": 1})})


def simulated(tmp_path, *, seed=11, **settings):
    usual = {"miners": 12, "rounds": 2, "required_accuracy": 0.5, "all_rounds": True}
    file = task_file().model_copy(update={"seed": seed})
    return simulate_task(file, Settings(**{**usual, **settings}), tmp_path)


def total(report, name):
    return sum(int(miner[name]) for miner in report["miners"])


# ── money, beside the contracts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def world():
    return World()


def paid_by_the_contracts(world, scores):
    """The aggregator's share and every participant's claim, in address order; None: never revealed."""
    world.stage("empty")
    miners = world.miners[: len(scores)]
    world.form(miners)
    committed = [5 if score is None else score for score in scores]
    pairs = list(zip(miners, committed, strict=True))
    commits = tuple(score_commit(score, salt_of(miner), TASK, miner.address) for miner, score in pairs)
    candidate = world.candidate(participants=tuple(miner.address for miner in miners), score_commits=commits)
    world.publish_block(candidate, [miner for miner in miners if miner != world.aggregator])
    world.reveal_accuracy()
    for miner, score in zip(miners, scores, strict=True):
        if score is not None:
            world.reveal_score(miner, score)
    world.at(world.now() + SCORE_WINDOW + 1)
    world.distribute()
    claims = []
    for miner, score in pairs:
        is_left = world.views.rewards.get_settlement(TASK).remaining_parts > 0
        claims.append(world.claim(miner, score=score).event.amount_wei if is_left else 0)
    share = world.views.rewards.balance_of(world.aggregator.address)
    assert world.balance(world.deployment.rewards) == share
    return share, claims


@pytest.mark.parametrize(
    "scores",
    [[1000, 1, 999_999_999, 0, 123_456_789], [3, None, 0, 7, None], [0, None, 0, 0, None], [None] * 5],
    ids=["by score", "some unrevealed", "all revealed are zero", "nobody reveals"],
)
def test_the_reward_is_divided_as_by_the_contracts(world, scores):
    share, claims = economy.pay_out(REWARD, 100_000, scores)
    assert (share, claims) == paid_by_the_contracts(world, scores)
    assert share + sum(claims) == REWARD


def test_a_silent_aggregators_stake_is_divided_as_by_the_contracts(world):
    world.stage("drawn")
    cohort, silent = world.cohort_on_chain, world.aggregator.address
    culprit = cohort.miners.index(silent)
    before = world.views.stakes.stake_of(silent)
    world.at(world.now() + PUBLISH_WINDOW + 1)
    stakes = world.as_(world.stranger).stakes
    stakes.replace_aggregator(TASK)
    for miner in cohort.miners:
        if miner != silent:
            stakes.credit_slashed(TASK, silent, Offence.SILENCE, miner)
    found = [world.views.stakes.credit_of(miner) for miner in cohort.miners]
    found[culprit] = world.views.stakes.stake_of(silent) - before
    gains = economy.take_stake(cohort.stakes_wei, culprit, PENALTY_PPM)
    assert gains == found
    assert min(gains) < 0 == sum(gains)


def test_the_quorum_is_that_of_the_contracts(world):
    for rate in (0, 250_000, 333_333, 340_000, 500_000):
        world.stage("empty")
        world.publish(fault_rate_ppm=rate)
        for size in (3, 4, 5, 7, 20, 100, 199, 200):
            assert economy.required_votes(size, rate) == world.views.publisher.required_votes(TASK, size)


@given(st.lists(st.none() | st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(1, 2**88 - 1))
def test_every_wei_of_a_reward_is_paid(scores, reward):
    share, claims = economy.pay_out(reward, 123_456, scores)
    assert share + sum(claims) == reward
    assert min(claims) >= 0


@given(st.lists(st.integers(1, 2**88 - 1), min_size=2, max_size=20), st.integers(0, 10**6), st.data())
def test_a_taken_stake_is_given_on_to_the_wei(stakes, penalty_ppm, data):
    culprit = data.draw(st.integers(0, len(stakes) - 1))
    gains = economy.take_stake(stakes, culprit, penalty_ppm)
    assert sum(gains) == 0
    assert -gains[culprit] == stakes[culprit] * penalty_ppm // 10**6


@given(AMOUNTS)
def test_gini_is_half_the_mean_difference_over_the_mean(amounts):
    found = economy.gini(amounts)
    if sum(amounts) == 0:
        assert found is None
    else:
        differences = sum(abs(a - b) for a in amounts for b in amounts)
        assert found == pytest.approx(differences / (2 * len(amounts) * sum(amounts)))


def test_gini_and_lorenz_of_known_distributions():
    assert economy.gini([5, 5, 5]) == 0
    assert economy.gini([0, 0, 0, 8]) == 0.75
    assert economy.lorenz([1, 1, 1, 1], points=4) == [0, 0.25, 0.5, 0.75, 1]
    assert economy.lorenz([0, 8, 0, 0], points=4) == [0, 0, 0, 0, 1]
    assert economy.lorenz([3, 1]) == [0, 0.25, 1]


def test_correlation_of_what_does_not_vary_is_none():
    assert economy.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert economy.correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert economy.correlation([1, 1, 1], [6, 4, 2]) is None


# ── rounds, beside the steps ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_is_what_the_steps_compute(tmp_path):
    task = form(task_file(), Settings(miners=8, rounds=2, required_accuracy=1.0), tmp_path)
    play(task, lambda *_: None, lambda _: None)
    spec, model = task.spec, initial_model(task.spec)
    memories = [Memory.zero(model.parameters.size)] * 8
    for number in (1, 2):
        vectors = []
        for i, miner in enumerate(task.members):
            order = order_of_samples(spec, miner.address, number)
            own = miner.dataset(task.shared)
            _, vector, memories[i] = local_round(spec, model, own, memories[i], number, sample_order=order)
            vectors.append(vector)
        opened = plain_sum(vectors, task.cohort.weights)
        model = next_model(spec, model, number, opened, sum(task.cohort.weights))
        assert task.rounds[number - 1]["model_sha256"] == model.sha256


def test_the_same_seed_gives_the_same_report_and_another_one_does_not(tmp_path):
    settings = {"dropout": 0.2, "stakes": "pareto", "label_noise": 0.4, "cheats": {"noise": 0.2}, "unrevealed": 0.1}
    first, again, other = (simulated(tmp_path, seed=seed, **settings) for seed in (11, 11, 12))
    assert first.pop("measured").keys() == again.pop("measured").keys()
    assert json.dumps(first) == json.dumps(again)
    assert [row["model_sha256"] for row in first["rounds"]] != [row["model_sha256"] for row in other["rounds"]]


def test_encryption_changes_nothing_but_the_time(tmp_path):
    plain = simulated(tmp_path, miners=5)
    encrypted = simulated(tmp_path, miners=5, encrypt=True)
    assert plain["rounds"] == encrypted["rounds"]
    assert plain["miners"] == encrypted["miners"]
    assert set(encrypted["measured"]["seconds"]) > {"encrypting", "auditing", "opening", "verifying"}


def test_a_paid_task_pays_the_whole_reward(tmp_path):
    report = simulated(tmp_path, required_accuracy=0.7)
    assert report["task"]["status"] == "PAID"
    assert report["money_wei"] == {"publisher": str(-(10**18)), "miners": str(10**18), "sum": "0"}
    assert total(report, "share_wei") == 10**17
    aggregator = next(miner for miner in report["miners"] if miner["name"] == report["aggregator"])
    assert int(aggregator["share_wei"]) == 10**17
    assert report["votes"]["accepting"] >= report["votes"]["required"]


def test_a_task_stops_when_the_accuracy_is_met_unless_all_rounds_are_asked_for(tmp_path):
    assert len(simulated(tmp_path, all_rounds=False)["rounds"]) == 1
    assert len(simulated(tmp_path)["rounds"]) == 2


def test_an_accuracy_nobody_reaches_refunds_the_publisher(tmp_path):
    report = simulated(tmp_path, required_accuracy=1.0)
    assert (report["task"]["status"], report["task"]["reason"]) == (
        "REFUNDED",
        "accuracy not reached in the agreed rounds: 2",
    )
    assert report["money_wei"] == {"publisher": "0", "miners": "0", "sum": "0"}
    assert report["economics"]["gini_of_rewards"] is None


def test_too_few_submissions_end_the_task(tmp_path):
    report = simulated(tmp_path, dropout=1.0)
    assert "0 submissions beside the aggregator's own, at least 3" in report["task"]["reason"]
    assert report["rounds"] == []
    assert report["money_wei"]["publisher"] == "0"


def test_too_few_votes_reject_the_candidate(tmp_path):
    report = simulated(tmp_path, miners=30, dropout=0.6)
    assert report["votes"]["accepting"] < report["votes"]["required"] == 20
    assert report["task"]["reason"].startswith("candidate rejected")
    assert report["money_wei"]["publisher"] == "0"


def test_miners_that_vanish_are_not_paid_for_the_rounds_without_them(tmp_path):
    report = simulated(tmp_path, miners=16, dropout=0.3)
    rounds = {miner["name"]: miner["rounds"] for miner in report["miners"]}
    assert sum(rounds.values()) == sum(row["submissions"] for row in report["rounds"])
    assert set(rounds.values()) >= {1, 2}
    assert rounds[report["aggregator"]] == 2
    assert all(miner["score"] == 0 for miner in report["miners"] if miner["rounds"] == 0)


def test_who_never_reveals_earns_nothing(tmp_path):
    report = simulated(tmp_path, miners=16, unrevealed=0.4)
    silent = [miner for miner in report["miners"] if miner["revealed_score"] is None]
    assert 0 < len(silent) < 16
    assert {miner["reward_wei"] for miner in silent} == {"0"}
    assert total(report, "reward_wei") == 9 * 10**17


def test_a_silent_aggregator_loses_what_the_others_get(tmp_path):
    report = simulated(tmp_path, cheats={"silent": 1.0}, stakes="uniform")
    assert (report["task"]["status"], report["rounds"]) == ("REFUNDED", [])
    gains = {miner["name"]: int(miner["from_stakes_wei"]) for miner in report["miners"]}
    stake = next(int(miner["stake_wei"]) for miner in report["miners"] if miner["name"] == report["aggregator"])
    assert gains[report["aggregator"]] == -(stake // 5)
    assert sum(gains.values()) == 0


# ── cheats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cheated(tmp_path_factory):
    cheats = {"zero": 0.1, "noise": 0.1, "replay": 0.1, "inflate": 0.1}
    return simulated(tmp_path_factory.mktemp("cheats"), miners=20, rounds=3, cheats=cheats)


def of_rounds(count):
    spec = task_file().spec()
    return spec.model_copy(update={"rounds": spec.rounds.model_copy(update={"max_rounds": count})})


def of(report, character):
    return [miner for miner in report["miners"] if miner["character"] == character]


def test_zeros_earn_nothing_and_an_inflated_score_earns_by_the_bound(cheated):
    assert {miner["reward_wei"] for miner in of(cheated, "zero")} == {"0"}
    bound = largest_score(of_rounds(3))
    assert {miner["revealed_score"] for miner in of(cheated, "inflate")} == {bound}
    assert all(miner["score"] < bound for miner in of(cheated, "inflate"))
    by_character = cheated["economics"]["characters"]
    assert by_character["inflate"]["times_an_even_share"] > 1 > by_character[HONEST]["times_an_even_share"]
    assert sum(row["miners"] for row in by_character.values()) == 20


def test_noise_reaches_the_clipped_norm_and_no_more(cheated):
    spec = of_rounds(3)
    rules = spec.compression
    clipped = rules.clip_norm * rules.scale * SCORE_UNIT
    for miner in of(cheated, "noise"):
        assert 0.99 * 3 * clipped < miner["score"] <= largest_score(spec)
    for miner in of(cheated, "replay"):  # in the first round there is nothing to send again
        assert miner["rounds"] == 3
        assert 0 < miner["score"] <= 2 * clipped * 1.001


# ── who takes part ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_those_with_most_stake_are_admitted(tmp_path):
    task = form(task_file(), Settings(miners=40, admitted=10, stakes="pareto"), tmp_path)
    everybody = populate(task.spec, task.settings, task.shared)
    most = sorted((miner.stake_wei for miner in everybody), reverse=True)[:10]
    assert sorted((miner.stake_wei for miner in task.members), reverse=True) == most
    assert min(most) > task.spec.money.minimum_stake_wei
    assert len(task.refused) == 30
    addresses = [miner.address.lower() for miner in task.members]
    assert addresses == sorted(addresses)


@pytest.mark.parametrize(("miners", "samples", "is_divided"), [(10, None, True), (10, 40, False), (60, None, False)])
def test_samples_are_divided_where_there_are_enough_and_drawn_otherwise(tmp_path, miners, samples, is_divided):
    task = form(task_file(), Settings(miners=miners, samples=samples), tmp_path)
    assert min(len(miner.indices) for miner in task.members) >= task.spec.dataset.samples_min
    held = np.sort(np.concatenate([miner.indices for miner in task.members]))
    assert np.array_equal(held, np.arange(len(task.shared))) == is_divided


def test_a_small_alpha_skews_labels_and_noise_spoils_them(tmp_path):
    spec = task_file().spec()
    shared, _ = ready_sets(spec)

    def mean(measure, **settings):
        found = populate(spec, Settings(miners=60, **settings), shared)
        return np.mean([measure(miner) for miner in found])

    def balance(miner):
        return miner.label_balance(2)

    assert mean(balance, alpha=0.1) < 0.5 < 0.9 < mean(balance, alpha=100.0)
    assert mean(lambda miner: miner.right_labels(shared)) == 1
    assert mean(lambda miner: miner.right_labels(shared), label_noise=0.5) == pytest.approx(0.75, abs=0.06)


def test_a_memory_is_kept_between_rounds(tmp_path):
    memories = Memories(tmp_path, 3, 4)
    memories[1] = Memory(np.full(4, 1.5, np.float32), np.arange(4, dtype=np.float32))
    assert memories[1].velocity.tolist() == [1.5] * 4
    assert memories[1].residual.tolist() == [0, 1, 2, 3]
    assert not memories[0].residual.any()
    assert not memories[2].velocity.any()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"miners": 0}, "miners = 0: give a number from 1"),
        ({"miners": 3}, "3 miners: the task asks for at least participants.miners_min = 4"),
        ({"miners": 10, "admitted": 11}, "admitted = 11: give a number from 1 to 10"),
        ({"dropout": 1.5}, "dropout = 1.5: give a number from 0 to 1"),
        ({"dropout": float("nan")}, "dropout = nan"),
        ({"alpha": 0.0}, "alpha = 0.0: give a positive number"),
        ({"stakes": "even"}, "stakes = 'even': one of equal, uniform, pareto"),
        ({"cheats": {"lazy": 0.1}}, "cheats: 'lazy' is no character: one of zero, noise"),
        ({"cheats": {"honest": 0.1}}, "cheats: 'honest' is no character"),
        ({"cheats": {"zero": 0.7, "noise": 0.7}}, "their shares add up to 1.4: at most 1"),
        ({"rounds": 0}, "rounds = 0: give a number from 1"),
        ({"required_accuracy": 0.0}, "required_accuracy = 0.0"),
        ({"samples": 5}, "samples = 5: give a number from 20 (dataset.samples_min) to 398"),
        ({"miners": 100_000, "encrypt": True}, "GiB of memory, more than 4: fewer miners"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_a_remedy(tmp_path, settings, said):
    with pytest.raises(InvalidSetting) as error:
        simulate_task(task_file(), Settings(**{"miners": 10, **settings}), tmp_path)
    assert said in str(error.value)


def test_a_cohort_whose_sums_could_not_be_recovered_is_refused(tmp_path):
    file = task_file()
    fine = file.model_copy(update={"compression": file.compression.model_copy(update={"bits": 20})})
    with pytest.raises(InvalidSetting, match="beyond what recovery can search"):
        form(fine, Settings(miners=1000), tmp_path)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_a_report_and_a_page(tmp_path):
    arguments = ["--miners", "12", "--rounds", "1", "--accuracy", "0.5", "--cheat", "zero=0.25", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, ["simulate", "breast-cancer", *arguments])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "simulation.json").read_text())
    assert len(of(report, "zero")) == 3
    page = (tmp_path / "simulation.html").read_text()
    assert page.count("<svg") == 3
    assert simulation_page.sentence(report) in page
    assert "money adds up to 0 wei" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["simulation.html", "simulation.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cheat", "zero"], "--cheat zero: expected NAME=SHARE"),
        (["--dropout", "2"], "dropout = 2.0"),
        (["x"], "x: no"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, said, capfd):
    done = CliRunner().invoke(cli.app, ["simulate", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert said in done.output + capfd.readouterr().err


def test_data_of_ones_own_is_refused_by_name(tmp_path):
    file = task_file()
    own = file.model_copy(update={"dataset": file.dataset.model_copy(update={"name": "xrays"})})
    with pytest.raises(ValueError, match=r"dataset\.name = 'xrays': no ready data set"):
        form(own, Settings(miners=10), tmp_path)


def test_the_plot_shows_every_miner_and_only_known_characters(cheated):
    picture = ET.fromstring(simulation_page.draw_rewards(cheated["miners"]))
    circles = picture.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 20
    for circle in circles:
        assert simulation_page.LEFT <= float(circle.get("cx")) <= simulation_page.WIDTH - simulation_page.RIGHT
        assert simulation_page.TOP <= float(circle.get("cy")) <= simulation_page.HEIGHT - simulation_page.BOTTOM
    assert set(simulation_page.COLOURS) == set(CHARACTERS)


def test_the_limit_of_the_contracts_is_theirs():
    source = (Path(__file__).parents[2] / "contracts" / "src" / "Task.sol").read_text()
    assert f"MAX_MINERS = {CONTRACTS_ADMIT};" in source
