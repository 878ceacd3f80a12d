"""The alerts name what `/metrics` exports, each has its page, and promtool proves when each fires."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from tests import ledger
from tests.command import ROOT
from tests.test_pages import anchors
from tests.web import PATH, Web, event, serving, settings_of, signed

FOLDER: Final = ROOT / "deploy" / "monitoring"
ALERTS: Final = FOLDER / "alerts.yml"
TESTS: Final = sorted(FOLDER.glob("*.test.yml"))
NAMES: Final = {
    "PayfoldNothingArrives",
    "PayfoldBacklogGrows",
    "PayfoldEventsParked",
    "PayfoldProcessSilent",
    "PayfoldDrift",
}
RECONCILED: Final = (
    "INSERT INTO reconciliations (started_at, finished_at, outcome, drift, checks, result)"
    " VALUES (now(), now() + make_interval(secs => :age), :outcome, 3, '{rules}', '{}')"
)
BEAT: Final = (
    "INSERT INTO heartbeats (kind, name, instance, at, since, outcome)"
    " VALUES ('job', 'reconcile', 'a:1', now() - interval '1 hour', now() - interval '1 day', :outcome)"
)
SELECTED_LABEL: Final = re.compile(r"[{,]\s*(\w+)(?:=~|!~|!=|=)")


def rules() -> list[str]:
    """Return the text of each rule."""
    return ALERTS.read_text(encoding="utf-8").split("- alert: ")[1:]


def selectors(text: str) -> Mapping[str, set[str]]:
    """Return the labels by which *text* chooses samples, of each metric that it names."""
    found: dict[str, set[str]] = {}
    for name, chosen in re.findall(r"\b(payfold_\w+)({[^}]*})?", text):
        found.setdefault(name, set()).update(SELECTED_LABEL.findall(chosen))
    return found


def fill(engine: Engine) -> None:
    """Let there be a sample of everything: a parked event, a reconciliation, a job, a week in which webhooks came."""
    ledger.execute(engine, "UPDATE inbox SET received_at = now() - interval '8 days'")
    ledger.execute(
        engine,
        "INSERT INTO outcomes (seq, state, cause, attempts, folded_at, fold_version)"
        " SELECT seq, 'parked', 'fold_failed', 1, now(), 1 FROM inbox",
    )
    ledger.execute(engine, RECONCILED, age=0, outcome="drift")


def exported(web: Web) -> Mapping[str, set[str]]:
    """Return the labels of each metric that a scrape has samples of."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(web.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_metrics_exist(engine: Engine, database_url: str, redis_url: str) -> None:
    """Each metric that an alert or its tests name is in a scrape, with each label that is chosen by."""
    with serving(settings_of(database_url, redis_url)) as web:
        assert web.deliver(event(1)).status_code == 200
        assert (
            web.client.post(PATH, content=event(2), headers=signed(event(2), secret="whsec_other")).status_code == 400
        )
        fill(engine)
        shown = exported(web)

    for path in (ALERTS, *TESTS):
        for name, labels in selectors(path.read_text(encoding="utf-8")).items():
            # What Prometheus itself adds to each sample.
            assert labels - {"job", "instance"} <= shown[name], name


@pytest.mark.parametrize(
    ("job", "seconds_after_now", "failed"),
    [(None, None, 0), ("ok", None, 0), ("running", None, 0), ("database_away", None, 1),
     ("database_away", -7200, 1), ("database_away", 0, 0)],
)  # fmt: skip
def test_failed_reconciliation(
    engine: Engine, database_url: str, redis_url: str, job: str | None, seconds_after_now: int | None, failed: int
) -> None:
    """A reconciliation of the worker has failed if its last did not end well and none has ended since."""
    if job is not None:
        ledger.execute(engine, BEAT, outcome=job)
    if seconds_after_now is not None:
        ledger.execute(engine, RECONCILED, age=seconds_after_now, outcome="incomplete")
    with serving(settings_of(database_url, redis_url, PAYFOLD_RECONCILE_AT="03:30")) as web:
        text = web.get("/metrics").text

    assert f"payfold_reconciliation_failed {failed}.0" in text
    assert "payfold_reconciliation_is_daily 1.0" in text
    assert ('payfold_reconciliation_outcome{outcome="incomplete"} 1.0' in text) == (seconds_after_now is not None)
    assert "payfold_events_fetched_total 0.0" in text


def test_each_alert_has_its_heading() -> None:
    """There are five alerts, and the link of each leads to a heading of its name in the runbook."""
    found = anchors(FOLDER / "runbook.md")
    for rule in rules():
        name = rule.split()[0]
        ((file, anchor),) = re.findall(r"runbook_url: (\S+)#(\S+)", rule)
        assert (ROOT / file, anchor) == (FOLDER / "runbook.md", name.lower())
        assert anchor in found

    assert {rule.split()[0] for rule in rules()} == NAMES


def test_each_reason_is_explained_and_tested() -> None:
    """Each reason for which an alert fires is a line of the runbook, and fires in a test."""
    page = (FOLDER / "runbook.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS)
    reasons = re.findall(r"because: (\w+)}", ALERTS.read_text(encoding="utf-8"))

    assert len(reasons) == len(rules()) - 1 == len(set(reasons))
    for reason in reasons:
        assert f"| `{reason}` |" in page
        assert re.search(rf'because(: |="){reason}\b', tests), reason


@pytest.mark.parametrize("path", [ALERTS, *TESTS], ids=lambda path: path.name)
def test_promtool(path: Path) -> None:
    """Prometheus takes the rules, and each fires where its tests expect it and nowhere else."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on this machine: it is in Debian's package prometheus")
    checks = ["test", "rules"] if path in TESTS else ["check", "rules", "--lint=all", "--lint-fatal"]
    done = subprocess.run([promtool, *checks, str(path)], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
