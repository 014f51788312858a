"""A task file is accepted as a whole, or every wrong field is named with its value and what would be right."""

import json
import random
import re
import tomllib
from typing import Any

import pytest

from contracts.task_spec import InvalidTask, PublishedTask, TaskFile, TaskSpec, load_task_file
from infra.devstack import READY_DATASETS
from tasks.learning.compression import density_of_round
from tasks.publish import check_runnable
from tests.protocol.world import TERMS
from tests.test_imports import ROOT

READY = sorted((ROOT / "deployments" / "ready").glob("*.toml"))
DIGITS = (ROOT / "deployments" / "ready" / "digits.toml").read_text()
WORKLOAD = "wasm:" + "1a" * 32
FULL = (
    f"workload = '{WORKLOAD}'"
    + TERMS
    + """
audit_projections = 3
[model.options]
hidden = 4
[aggregation.options]
learning_rate = 0.5
[workload_limits]
"""
)


def replaced(text: str, field: str, value: str) -> str:
    """The task file with `section.field = value` in place of its line, or added to the section."""
    section, _, name = field.rpartition(".")
    lines, inside, done = [], not section, False
    for line in text.splitlines():
        if line.startswith("["):
            inside = line.split("#")[0].strip() == f"[{section}]"
            lines.append(line)
            if inside and not any(entry.startswith(f"{name} ") for entry in section_of(text, section)):
                lines.append(f"{name} = {value}")
                done = True
        elif inside and line.split("=")[0].strip() == name:
            lines.append(f"{name} = {value}")
            done = True
        else:
            lines.append(line)
    assert done, field
    return "\n".join(lines)


def section_of(text: str, section: str) -> list[str]:
    after = text.split(f"[{section}]", 1)[1].splitlines()[1:]
    end = next((i for i, line in enumerate(after) if line.startswith("[")), len(after))
    return after[:end]


def refusal(text: str) -> str:
    with pytest.raises(InvalidTask) as refused:
        load_task_file(text)
    return str(refused.value)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_tasks_are_in_order(path):
    file = load_task_file(path.read_text())
    assert file.name == path.stem
    assert file.spec().model_dump() == file.model_dump(exclude={"required_accuracy"})


def test_there_are_ready_tasks():
    assert [path.stem for path in READY] == sorted(READY_DATASETS)


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_tasks_can_run_and_have_every_coordinate_checked(path):
    spec = load_task_file(path.read_text()).spec()
    dimension = check_runnable(spec)
    comment = re.search(r"# (.*) parameters", path.read_text().split("[model.options]")[1])
    assert comment is not None
    assert dimension == int(comment[1].replace(" ", ""))
    most = max(density_of_round(number, spec.compression.density, spec.compression.warmup_rounds) for number in (1, 9))
    assert spec.voting.spot_checks * spec.voting.chunk_coordinates >= most * dimension


def test_one_ready_task_is_a_real_network_and_ten_miners():
    spec = load_task_file((ROOT / "deployments" / "ready" / "fashion-mnist.toml").read_text()).spec()
    assert check_runnable(spec) >= 400_000
    assert spec.participants.miners_min == 10
    assert spec.compression.density == 0.1


def test_an_override_replaces_a_field_and_is_checked_too():
    assert load_task_file(DIGITS, seed=7).seed == 7
    with pytest.raises(InvalidTask, match="seed = -7"):
        load_task_file(DIGITS, seed=-7)


WRONG = [
    # field, what is written, what the text must say beside the field's name
    ("name", '"Digits"', ["'Digits'", "[a-z0-9]"]),
    ("name", '"a b"', ["'a b'", "[a-z0-9]"]),
    ("name", '"../digits"', ["'../digits'", "[a-z0-9]"]),
    ("name", '"x"', ["'x'", "[a-z0-9]"]),
    ("name", '"' + "a" * 60 + '"', ["[a-z0-9]"]),
    ("seed", "-1", ["-1", "greater than or equal to 0"]),
    ("seed", str(2**63), [str(2**63), "less than"]),
    ("required_accuracy", "0", ["0", "greater than 0"]),
    ("required_accuracy", "1.5", ["1.5", "less than or equal to 1"]),
    ("required_accuracy", "-0.5", ["-0.5", "greater than 0"]),
    ("required_accuracy", "nan", ["nan"]),
    ("required_accuracy", '"high"', ["'high'", "number"]),
    ("required_accuracy", "0.0000001", ["1e-07"]),  # would be 0 parts per million
    ("money.reward_wei", "-5", ["-5", "greater than 0"]),
    ("money.reward_wei", "0", ["0", "greater than 0"]),
    ("money.reward_wei", str(2**88), [str(2**88), "less than"]),
    ("money.reward_wei", "0.5", ["0.5", "integer"]),
    ("money.reward_wei", "[1]", ["[1]", "integer"]),
    ("money.aggregator_share", "0.6", ["0.6", "less than or equal to 0.5"]),
    ("money.minimum_stake_wei", "0", ["0", "greater than 0"]),
    ("money.silence_penalty", "1.1", ["1.1", "less than or equal to 1"]),
    ("money.reward_token", '"0x12"', ["0x12", "match pattern"]),
    ("participants.miners_min", "3", ["3", "greater than or equal to 4"]),
    ("participants.miners_min", "2026-01-01", ["integer"]),
    ("participants.miners_max", "201", ["201", "less than or equal to 200"]),
    ("participants.submissions_min", "2", ["2", "greater than or equal to 3"]),
    ("participants.tolerated_faults", "0.51", ["0.51", "less than or equal to 0.5"]),
    ("participants.weight_levels", "0", ["0", "greater than or equal to 1"]),
    ("rounds.max_rounds", "0", ["0", "greater than or equal to 1"]),
    ("rounds.max_rounds", "2.5", ["2.5", "integer"]),
    ("rounds.contribution_timeout_s", "0", ["0", "greater than 0"]),
    ("rounds.contribution_timeout_s", "inf", ["inf", "finite"]),
    ("rounds.attestation_timeout_s", "inf", ["inf", "finite"]),
    ("rounds.attestation_timeout_s", "1e12", ["less than"]),  # no clock of the system waits that long
    ("windows.deadline_s", "59", ["59", "greater than or equal to 60"]),
    ("windows.publish_s", "0", ["0", "greater than or equal to 1"]),
    ("windows.score_reveal_s", "0", ["0", "greater than or equal to 1"]),
    ("dataset.name", '""', ["''", "at least 1 character"]),
    ("dataset.classes", "1", ["1", "greater than or equal to 2"]),
    ("dataset.input_shape", "[]", ["at least 1 item"]),
    ("dataset.input_shape", "[1, 8, 0]", ["[1, 8, 0]", "positive"]),
    ("dataset.input_shape", '"8x8"', ["'8x8'"]),
    ("dataset.transform", '"cube"', ["'cube'", "'linear', 'log' or 'sqrt'"]),
    ("dataset.challenged_leaves", "257", ["257", "less than or equal to 256"]),
    ("model.name", "5", ["5", "string"]),
    ("training.local_epochs", '"many"', ["'many'", "integer"]),
    ("training.learning_rate", "inf", ["inf", "finite"]),
    ("training.learning_rate", "0.0", ["0.0", "greater than 0"]),
    ("training.momentum", "1.0", ["1.0", "less than 1"]),
    ("training.batch_size", "1" + "0" * 30, ["1" + "0" * 30, "less than"]),
    ("compression.density", "0", ["0", "greater than 0"]),
    ("compression.density", "1.1", ["1.1", "less than or equal to 1"]),
    ("compression.clip_norm", "inf", ["inf", "finite"]),
    ("compression.bits", "25", ["25", "less than or equal to 24"]),
    ("compression.value_limit", "5000.0", ["5000.0", "at most 2047"]),
    ("compression.value_limit", "1e-320", ["1e-320"]),  # a scale beyond any number
    ("aggregation.server_step", '"sgd"', ["'sgd'", "'fedavg' or 'fedadam'"]),
    ("voting.open_validation", '"perhaps"', ["'perhaps'", "boolean"]),
    ("voting.spot_checks", "0", ["0", "greater than or equal to 1"]),
    ("voting.chunk_coordinates", "15", ["15", "greater than or equal to 16"]),
    ("voting.audit_projections", "65", ["65", "less than or equal to 64"]),
]


@pytest.mark.parametrize(("field", "value", "says"), WRONG, ids=[f"{field}={value[:24]}" for field, value, _ in WRONG])
def test_a_wrong_field_is_named_with_its_value_and_what_would_be_right(field, value, says):
    text = refusal(replaced(DIGITS, field, value))
    assert len(text.splitlines()) == 1
    section, _, name = field.rpartition(".")
    assert section in text.split(":")[0]
    for part in (name, *says):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"participants.miners_min": "21"}, ["participants", "miners_max = 20", "miners_min = 21"]),
        ({"participants.submissions_min": "4"}, ["submissions_min = 4", "at most miners_min - 1 = 3"]),
        (
            {"compression.bits": "24", "participants.weight_levels": "256"},
            ["compression.bits = 24", "weight_levels = 256", "miners_max = 20", str(2**32), "lower one of them"],
        ),
        ({"dataset.low": "[1.0]", "dataset.high": "[2.0]"}, ["dataset", "low has 1 numbers for 64 features"]),
        ({"dataset.low": str([0.0] * 64)}, ["dataset", "low and high go together"]),
        (
            {"dataset.low": str([0.0] * 64), "dataset.high": str([0.0] + [1.0] * 63)},
            ["dataset", "every low is below its high"],
        ),
        ({"dataset.low": str([0.0] * 64), "dataset.high": str([1.0] * 65)}, ["high has 65 numbers for 64 features"]),
    ],
)
def test_fields_that_do_not_fit_each_other_are_named_together(changes, says):
    text = DIGITS
    for field, value in changes.items():
        text = replaced(text, field, value)
    found = refusal(text)
    for part in says:
        assert part in found


@pytest.mark.parametrize(
    "changes",
    [
        {"participants.miners_min": "20"},
        {"participants.submissions_min": "3"},
        {"compression.bits": "24"},
        {"dataset.low": str([0.0] * 64), "dataset.high": str([1.0] * 64)},
        {"required_accuracy": "1"},
        {"money.reward_wei": str(2**88 - 1)},
    ],
)
def test_the_same_within_its_limits_is_accepted(changes):
    text = DIGITS
    for field, value in changes.items():
        text = replaced(text, field, value)
    assert isinstance(load_task_file(text), TaskFile)


@pytest.mark.parametrize(
    "section", ["money", "participants", "rounds", "windows", "dataset", "model", "training", "compression", "voting"]
)
def test_a_missing_section_is_named(section):
    lines = refusal(DIGITS.replace(f"[{section}]", f"[other.{section}]").replace("[model.options]", "[other.options]"))
    assert f"{section}: is missing: add it" in lines.splitlines()


@pytest.mark.parametrize("workload", ["wasm:1234", WORKLOAD.upper(), "logistic.wasm", ""])
def test_a_workload_that_names_no_digest_is_refused(workload):
    text = refusal(f"workload = '{workload}'\n{DIGITS}")
    assert text.startswith(f"workload = {workload!r}: String should match pattern")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("fuel = 0", "workload_limits.fuel = 0: Input should be greater than or equal to 1"),
        ("memory_bytes = 8_000_000_000", "workload_limits.memory_bytes = 8000000000: Input should be less than"),
        ("wall_clock_s = inf", "workload_limits.wall_clock_s = inf"),
        ("disk_bytes = 1", "workload_limits.disk_bytes = 1: is not a field of a task"),
    ],
)
def test_a_wrong_limit_of_the_workload_is_named(line, says):
    assert refusal(f"{FULL}\n{line}").startswith(says)


def test_limits_without_a_workload_are_refused():
    assert "workload_limits are given without a workload" in refusal(f"{DIGITS}\n[workload_limits]\nfuel = 5")


def test_terms_without_a_workload_do_not_mention_one():
    """Their hash stays what it was before a program knew of workloads."""
    task = PublishedTask(
        task_id="a-task",
        publisher="0x" + "11" * 20,
        validation_sha256="0x" + "22" * 32,
        spec=load_task_file(DIGITS).spec(),
    )
    assert b"workload" not in task.encode()


def test_an_unknown_field_is_named():
    assert refusal(replaced(DIGITS, "money.bonus_wei", "1")) == (
        "money.bonus_wei = 1: is not a field of a task: remove it or correct its name"
    )


def test_a_missing_field_is_named():
    assert refusal(DIGITS.replace("reward_wei", "reward_gwei")).splitlines() == [
        "money.reward_wei: is missing: add it",
        "money.reward_gwei = 1000000000000000000: is not a field of a task: remove it or correct its name",
    ]


@pytest.mark.parametrize("text", ["a = ", "[money", "{}", "\x00", "name = 'a'\nname = 'b'"])
def test_what_is_no_toml_is_said_to_be_none(text):
    assert "not a TOML file" in refusal(text)


def test_a_number_of_five_thousand_digits_is_refused():
    assert "digits" in refusal(replaced(DIGITS, "rounds.max_rounds", "9" * 5000))


def test_an_empty_file_names_everything_that_is_missing():
    names = {line.split(":")[0] for line in refusal("").splitlines()}
    assert names == {name for name, field in TaskFile.model_fields.items() if field.is_required()}


def test_several_wrong_fields_are_named_at_once():
    text = DIGITS
    wrong = {
        "required_accuracy": "1.5",
        "money.reward_wei": "-5",
        "participants.tolerated_faults": "0.9",
        "training.momentum": "2.0",
        "voting.spot_checks": "0",
        "dataset.classes": '"ten"',
    }
    for field, value in wrong.items():
        text = replaced(text, field, value)
    assert {line.split(" ")[0] for line in refusal(text).splitlines()} == set(wrong)


# The hash on chain


def published(fields: dict[str, Any]) -> PublishedTask:
    spec = TaskFile.model_validate(fields).spec()
    return PublishedTask(task_id="a-task", publisher="0x" + "11" * 20, validation_sha256="0x" + "22" * 32, spec=spec)


def leaves(fields: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in fields.items():
        found += leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


def other(name: str, value: Any) -> Any:
    """Another value that the field allows."""
    if name == "server_step":
        return "fedadam"
    if name == "transform":
        return "sqrt"
    if name == "workload":
        return WORKLOAD.replace("1a", "2b")
    if name == "reward_token":
        return "0x" + "11" * 20
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list | tuple):
        return [2, *value[1:]] if name == "input_shape" else ["a", "b"] if name == "class_names" else [*value, 1.0]
    if name == "momentum":
        return value + 0.25
    if name in ("miners_min", "miners_max", "submissions_min"):
        return {"miners_min": 5, "miners_max": 6, "submissions_min": 4}[name]
    return value + 1 if isinstance(value, int) else value * 0.75 if value else 0.25


BASE = load_task_file(FULL.replace("miners_min = 4", "miners_min = 5").replace("miners_max = 5", "miners_max = 9"))
FIELDS = BASE.model_dump(mode="json")
LEAVES = [
    path
    for path in leaves(FIELDS)
    if path != ("required_accuracy",) and path not in (("dataset", "low"), ("dataset", "high"))
]


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_every_field_changes_the_hash(path):
    changed = json.loads(json.dumps(FIELDS))
    place = changed
    for name in path[:-1]:
        place = place[name]
    value = 6 if path[-1] == "miners_min" else other(path[-1], place[path[-1]])
    assert value != place[path[-1]]
    place[path[-1]] = value
    assert published(changed).spec_hash() != published(FIELDS).spec_hash()


@pytest.mark.parametrize("name", ["low", "high"])
def test_the_public_constants_change_the_hash(name):
    ranges = {"low": [0.0] * 64, "high": [1.0] * 64}
    some = {**FIELDS, "dataset": {**FIELDS["dataset"], **ranges}}
    shifted = {"low": [*[0.0] * 63, -0.5], "high": [*[1.0] * 63, 1.5]}[name]
    others = {**FIELDS, "dataset": {**some["dataset"], name: shifted}}
    assert len({published(fields).spec_hash() for fields in (FIELDS, some, others)}) == 3


def test_task_id_publisher_and_validation_set_change_the_hash():
    task = published(FIELDS)
    others = [
        task.model_copy(update={"task_id": "b-task"}),
        task.model_copy(update={"publisher": "0x" + "33" * 20}),
        task.model_copy(update={"validation_sha256": "0x" + "33" * 32}),
    ]
    assert len({one.spec_hash() for one in (task, *others)}) == 4


def test_every_field_of_the_terms_is_mutated_above():
    """A new section or field is in FIELDS by its default, so that nothing escapes the hash unseen."""
    assert {path[0] for path in LEAVES} == set(TaskSpec.model_fields)
    assert ("voting", "audit_projections") in LEAVES


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_keys_does_not_change_the_hash(seed):
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        names = list(value)
        random.Random(seed).shuffle(names)
        return {name: shuffled(value[name]) for name in names}

    assert published(shuffled(FIELDS)).spec_hash() == published(FIELDS).spec_hash()


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_terms_survive_their_encoding(path):
    task = published(tomllib.loads(path.read_text()))
    assert PublishedTask.model_validate_json(task.encode()) == task
    assert PublishedTask.model_validate_json(task.encode()).spec_hash() == task.spec_hash()


def test_the_required_accuracy_is_nowhere_in_the_terms():
    secret = 0.123454321
    file = load_task_file(replaced(DIGITS, "required_accuracy", str(secret)))
    assert file.required_accuracy_ppm == 123454
    task = published(file.model_dump())
    public = task.encode().decode() + repr(task) + file.spec().model_dump_json() + repr(file.spec())
    assert "required_accuracy" not in public
    assert "12345" not in public
    assert task.spec_hash() == published(load_task_file(DIGITS).model_dump()).spec_hash()


def test_terms_with_the_required_accuracy_in_them_are_refused():
    with pytest.raises(ValueError, match="required_accuracy"):
        TaskSpec.model_validate({**load_task_file(DIGITS).model_dump()})
