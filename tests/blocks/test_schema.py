"""The schema: migrations give exactly the models, keep what an older database holds, and go one at a time."""

import sqlite3
import subprocess
import sys
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text
from sqlmodel import SQLModel

from blocks import schema
from blocks.registry import Registry
from blocks.schema import FIRST, HEAD, UnknownSchema, bring_up_to_date
from blocks.tables import INDEX, OWN

ALICE = "0x" + "aa" * 20
# The tables as they were before migrations were kept.
UNVERSIONED = """
CREATE TABLE actors (name VARCHAR NOT NULL, address VARCHAR NOT NULL, role VARCHAR NOT NULL, PRIMARY KEY (name));
CREATE INDEX ix_actors_address ON actors (address);
CREATE INDEX ix_actors_role ON actors (role);
CREATE TABLE tasks (task_id VARCHAR NOT NULL, publisher VARCHAR NOT NULL, spec_hash VARCHAR NOT NULL,
    terms VARCHAR NOT NULL, status VARCHAR NOT NULL, reason VARCHAR NOT NULL, PRIMARY KEY (task_id));
CREATE TABLE records (task_id VARCHAR NOT NULL, round_number INTEGER NOT NULL, kind VARCHAR NOT NULL,
    signer VARCHAR NOT NULL, path VARCHAR NOT NULL, sha256 VARCHAR NOT NULL, message VARCHAR NOT NULL,
    PRIMARY KEY (task_id, round_number, kind, signer, path));
CREATE TABLE refusals (task_id VARCHAR NOT NULL, round_number INTEGER NOT NULL, step VARCHAR NOT NULL,
    actor VARCHAR NOT NULL, reason VARCHAR NOT NULL, PRIMARY KEY (task_id, round_number, step, actor));
CREATE TABLE steps (id INTEGER NOT NULL, task_id VARCHAR NOT NULL, round_number INTEGER NOT NULL, step VARCHAR NOT NULL,
    actor VARCHAR NOT NULL, started_s FLOAT NOT NULL, seconds FLOAT NOT NULL, outcome VARCHAR NOT NULL,
    detail VARCHAR NOT NULL, PRIMARY KEY (id));
CREATE INDEX ix_steps_task_id ON steps (task_id);
INSERT INTO actors VALUES ('miner-1', '0xaa', 'miner');
INSERT INTO tasks VALUES ('a-task', '0xbb', '0x01', 'terms', 'REFUNDED', 'not enough miners');
INSERT INTO records VALUES ('a-task', 1, 'Receipt', '0xaa', 'a.json', '0x01', '{}');
INSERT INTO refusals VALUES ('a-task', 1, 'contribute', '0xaa', 'no answer within 60 s');
INSERT INTO steps VALUES (7, 'a-task', 1, 'contribute', 'miner-1', 5.5, 1.5, 'ok', '');
"""
KEPT = {"actors": 3, "tasks": 6, "records": 7, "refusals": 5, "steps": 9}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite'}"
    return str(request.getfixturevalue("postgres_url"))


def run(url: str, script: str) -> None:
    with create_engine(url).begin() as connection:
        for statement in script.split(";\n"):
            if statement.strip():
                connection.execute(text(statement))


def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of the tables of before, in the columns that they had."""
    with create_engine(url).connect() as connection:
        columns = {
            table: [one["name"] for one in inspect(connection).get_columns(table)][:many]
            for table, many in KEPT.items()
        }
        return {
            table: [tuple(row) for row in connection.execute(text(f"SELECT {', '.join(names)} FROM {table}"))]
            for table, names in columns.items()
        }


def revision(url: str) -> str:
    with create_engine(url).connect() as connection:
        return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar())


def test_the_migrations_give_exactly_the_models(url):
    bring_up_to_date(create_engine(url))
    with create_engine(url).connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
        names = set(inspect(connection).get_table_names()) - {"alembic_version"}
    assert names == {table.__tablename__ for table in (*INDEX, *OWN)}


def test_a_model_that_no_migration_makes_is_seen(url):
    bring_up_to_date(create_engine(url))
    run(url, "DROP TABLE votes;\nALTER TABLE tasks DROP COLUMN outcome;\nDROP INDEX ix_pins_name;\n")
    with create_engine(url).connect() as connection:
        assert len(compare_metadata(MigrationContext.configure(connection), SQLModel.metadata)) == 3


def test_the_newest_revision_is_the_one_that_the_program_opens(url):
    bring_up_to_date(create_engine(url))
    with create_engine(url).connect() as connection:
        scripts = ScriptDirectory.from_config(schema._config(connection))
    assert scripts.get_heads() == [HEAD] == [revision(url)]
    assert scripts.get_bases() == [FIRST]


def test_a_database_without_a_revision_is_upgraded_without_loss(url):
    run(url, UNVERSIONED)
    before = contents(url)
    assert [len(rows) for rows in before.values()] == [1, 1, 1, 1, 1]
    registry = Registry(url=url)
    assert registry.find_actor("miner-1").address == "0xaa"
    assert contents(url) == before
    task = registry.find_task("a-task")
    assert (task.status, task.reason, task.aggregator) == ("REFUNDED", "not enough miners", None)
    assert [row.reason for row in registry.refusals("a-task")] == ["no answer within 60 s"]
    assert revision(url) == HEAD


def test_one_step_back_and_forth_keeps_what_both_have(url):
    run(url, UNVERSIONED)
    before = contents(url)
    engine = create_engine(url)
    bring_up_to_date(engine)
    bring_up_to_date(engine, FIRST)
    assert revision(url) == FIRST
    assert contents(url) == before
    assert set(inspect(engine).get_table_names()) == {*KEPT, "alembic_version"}
    bring_up_to_date(engine)
    assert contents(url) == before


def test_a_newer_database_is_refused_and_left_alone(url):
    bring_up_to_date(create_engine(url))
    run(url, "UPDATE alembic_version SET version_num = '9999';\n")
    with pytest.raises(
        UnknownSchema,
        match=r"its schema is 9999, this program knows 0001, 0002, 0003, 0004, 0005\. Use the newer HealChain",
    ):
        Registry(url=url).actors()
    assert revision(url) == "9999"


def test_a_failed_migration_changes_nothing(url, monkeypatch):
    run(url, UNVERSIONED)
    before = contents(url)
    # A database that holds a table of a later step already: the step fails in its middle.
    run(url, "CREATE TABLE pins (id INTEGER PRIMARY KEY);\n")
    with pytest.raises(Exception, match="already exists"):
        Registry(url=url).actors()
    assert contents(url) == before
    assert "alembic_version" not in inspect(create_engine(url)).get_table_names()
    assert "events" not in inspect(create_engine(url)).get_table_names()


OPENED = """
import sys
from sqlalchemy import create_engine
from blocks.schema import bring_up_to_date
engine = create_engine(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
bring_up_to_date(engine)
"""


def test_processes_that_open_a_database_at_once_do_not_collide(url):
    run(url, UNVERSIONED)
    before = contents(url)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    opened = [subprocess.Popen([sys.executable, "-c", OPENED, url], **pipes) for _ in range(3)]
    assert [process.stdout.readline() for process in opened] == ["ready\n"] * 3
    for process in opened:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[1] for process in opened] == [""] * 3
    assert contents(url) == before
    assert revision(url) == HEAD


def test_a_password_is_shown_nowhere():
    url = "postgresql+psycopg://user:hidden-word@127.0.0.1:1/registry"
    registry = Registry(url=url)
    assert "hidden-word" not in repr(registry) + str(registry.model_dump()) + registry.model_dump_json()
    assert "hidden-word" not in schema.shown_url(create_engine(url))


def test_sqlite_is_migrated_in_the_file_that_readers_have_open(tmp_path):
    """A reader of the old schema holds nobody up, and sees the old one until it asks again."""
    path = tmp_path / "registry.sqlite"
    run(f"sqlite:///{path}", UNVERSIONED)
    with sqlite3.connect(path) as reader:
        reader.execute("PRAGMA journal_mode=WAL")
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM tasks").fetchall() == [(1,)]
        bring_up_to_date(create_engine(f"sqlite:///{path}"))
        assert reader.execute("SELECT name FROM sqlite_master WHERE name = 'events'").fetchall() == []
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT name FROM sqlite_master WHERE name = 'events'").fetchall() == [("events",)]
