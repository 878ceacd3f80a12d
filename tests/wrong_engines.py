"""Breaks the engine on purpose, one way at a time, and shows that the tests notice.

    deploy/dev run python -m tests.wrong_engines [WORD…]

Each break is made in a copy of the tree, and the tests have to fail on it. Words select the breaks that have one of
them in their names. Ends with 1 if a broken engine passes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from deploy.local.services import embedded_services

ROOT = Path(__file__).parent.parent
TESTS = (
    *("tests/test_join.py", "tests/test_orders.py", "tests/test_money.py", "tests/test_projection.py"),
    *("tests/test_harm.py", "tests/test_lines.py", "tests/test_corrections.py", "tests/test_history.py"),
    *("tests/test_settling.py", "tests/test_parts_of_notes.py", "tests/test_moments.py", "tests/test_chain.py"),
    "tests/test_hidden_truth.py",
)
JOIN = "worker/folds/join.py"
CHAIN = "worker/folds/chain.py"
BALANCE = "worker/folds/balance.py"
SESSION = "worker/folds/checkout_session.py"
NOTE = "worker/folds/credit_note.py"
PROJECTION = "worker/folding/projection.py"
BREAK_SECONDS_MAX = 600


@dataclass(frozen=True)
class Break:
    """One broken engine: in *file*, *right* is replaced by *wrong*."""

    name: str
    file: str
    right: str
    wrong: str


BREAKS = (
    Break(
        "arrival order",
        "worker/folding/joining.py",
        "result = join.advance(spec, row, facts[subject]) if row is not None else result",
        "result = result or join.fold_all(spec, facts[subject])",
    ),
    Break(
        "a new note of which a ledger speaks is folded from its batch",
        "worker/folding/joining.py",
        "(subject not in mentioned if leader is None",
        "(True if leader is None",
    ),
    Break(
        "an equal event is laid over", JOIN, "steps[0].position <= (spec.rank_of", "steps[0].position < (spec.rank_of"
    ),
    Break(
        "a chain with a gap is laid over",
        CHAIN,
        "    if gaps or len(ends) > 1 or len({edge.step for edge in edges}) < len(edges):\n",
        "    if len(ends) > 1 or len({edge.step for edge in edges}) < len(edges):\n",
    ),
    Break(
        "stamp before rank", "worker/folds/facts.py", "return (self.rank, self.stamp)", "return (self.stamp, self.rank)"
    ),
    Break("a first page is all", SESSION, "or session.line_items.has_more:", "or False:"),
    Break(
        "lines that are gone stay",
        "worker/folding/saving.py",
        "if joined.replace_all and subject in saved.known]",
        "if joined.is_whole and subject in saved.known and not folds.ROW_SPECS[subject.table].child_key == ('order_id',)]",
    ),
    Break("a missing session decides", SESSION, "MISSING: _OPEN - 1}", "MISSING: _EXPIRED}"),
    Break(
        "no rank",
        SESSION,
        "rank=_RANK_OF_TYPE.get(event.type, _rank(status, session.payment_status, failed=failed)),",
        "rank=0,",
    ),
    Break(
        "failure is an unpaid completion", SESSION, "return _FAILED if failed else _PROCESSING", "return _PROCESSING"
    ),
    Break(
        "an unknown value ranks highest",
        SESSION,
        "    return _OPEN\n\n\ndef _columns",
        "    return _PAID\n\n\ndef _columns",
    ),
    Break(
        "greatest id decides a second",
        CHAIN,
        "    for edge in _backwards(ending, rules.prefer):\n",
        "    for edge in sorted(ending.edges, key=_seniority_of, reverse=True):\n",
    ),
    Break(
        "the events of a walk are in the order of their ids",
        CHAIN,
        "    for number in walk:\n",
        "    for number in sorted(walk):\n",
    ),
    Break("no anchor", CHAIN, "    found += fitting or [known]\n", "    found.append(None)\n"),
    Break(
        "a later second is the anchor of an earlier one",
        CHAIN,
        "course.group and course.group[0].stamp > position[1]:",
        "course.group and False:",
    ),
    Break(
        "twins are never dropped",
        CHAIN,
        "    while gaps := degrees.gaps_without(found[0]):\n",
        "    while gaps := 0:\n",
    ),
    Break("a possible twin is no doubt", CHAIN, "        if others:\n", "        if False:\n"),
    Break(
        "a doubt is forgotten", CHAIN, "    return list(distinct.values())[:COURSES_MAX]\n", "    return followed[:1]\n"
    ),
    Break(
        "the event that moved the rank does not begin the second",
        CHAIN,
        "    if earlier.group[0].rank < edges[0].facts.rank and not any(",
        "    if False and not any(",
    ),
    Break(
        "the ledger does not reveal twins",
        BALANCE,
        "testimony={} if ledger is None else _testimony(ledger)",
        "testimony={}",
    ),
    Break("a ledger begins anywhere", BALANCE, 'start={"amount": 0}, ', ""),
    Break(
        "a balance is decided by its own columns alone",
        "worker/folds/customer.py",
        "            _balance=_balance_of(customer),\n",
        "",
    ),
    Break(
        "a row in doubt is laid over",
        "worker/folding/joining.py",
        "from_all = refold | _in_doubt(cursor, (known.keys() - refold) | led)",
        "from_all = set(refold)",
    ),
    Break(
        "rows that share an order are not folded with it",
        "worker/folding/joining.py",
        "from_all |= {each for each in led if join.leader_of(",
        "from_all |= {each for each in led if False and join.leader_of(",
    ),
    Break(
        "something comes before created",
        CHAIN,
        "    if facts.is_first:\n        return _Edge(_NOTHING, after, facts)\n",
        "",
    ),
    Break(
        "no state before", CHAIN, "return facts.after if facts.before is None else facts.before", "return facts.after"
    ),
    Break(
        "null does not count as carried",
        JOIN,
        "    row.update(step.columns)\n",
        "    row.update({k: v for k, v in step.columns.items() if v is not None})\n",
    ),
    Break(
        "a null reference erases",
        JOIN,
        "        if reference is not None:\n            row[name] = reference\n",
        "        row[name] = reference\n",
    ),
    Break("the last moment counts", JOIN, "moment if known is None else min(known, moment)", "moment"),
    Break("the largest moment counts", JOIN, "min(known, moment)", "max(known, moment)"),
    Break("our clock's moment stays", JOIN, "row[spec.clock_moment] = None", "pass"),
    Break(
        "absent keys erase",
        "worker/folds/reading.py",
        "for name, value in fields.items() if value is not UNSET}\n\n\ndef references",
        "for name, value in ((n, None if v is UNSET else v) for n, v in fields.items())}\n\n\ndef references",
    ),
    Break(
        "nested previous attributes replace",
        "worker/folds/reading.py",
        "before[key] = overlay(known, value)",
        "before[key] = value",
    ),
    Break("a null metadata value is kept", "worker/folds/reading.py", "if text is not None}", "}"),
    Break(
        "inbox keyed by id alone",
        "schemas/inbox.py",
        "ON CONFLICT (account, livemode, id) DO NOTHING",
        "ON CONFLICT (seq) DO NOTHING",
    ),
    Break(
        "modes share a row",
        SESSION,
        'Subject("orders", event.account, event.livemode, session.id)',
        'Subject("orders", event.account, False, session.id)',
    ),
    Break(
        "accounts share a row",
        "worker/folds/reading.py",
        "Subject(table, event.account, event.livemode, key, root, currency)",
        'Subject(table, "", event.livemode, key, root, currency)',
    ),
    Break(
        "the first copy stays",
        "worker/folding/renderings.py",
        "chosen = max(at_hand or best, key=lambda each: each.rank)",
        "chosen = max(at_hand or best, key=lambda each: each.is_chosen)",
    ),
    Break(
        "no lock on the object",
        "schemas/locks.py",
        "SELECT pg_advisory_xact_lock(number) FROM (",
        "SELECT number FROM (",
    ),
    Break(
        "an order and its refund do not wait for each other",
        "worker/folding/changes.py",
        "    if (found or any(moved.values())) and",
        "    if (found and not any(moved.values())) and",
    ),
    Break(
        "an order and its charge do not wait for each other",
        PROJECTION,
        "        return False\n    keep_others_from_appending(cursor, rows=len(saved.rows))\n",
        "        return False\n",
    ),
    Break(
        "an order that another holds is passed over for good",
        PROJECTION,
        "    unsettled.owe(cursor, passed, why.pop() if len(why) == 1 else None)\n    return bool(passed)\n",
        "    return False\n",
    ),
    Break(
        "values from a charge count as the session's own",
        "worker/folding/joining.py",
        "if row is not None and settling.is_laid_on(subject, row):",
        "if False:",
    ),
    Break("a refund finds no note at rest", "worker/folding/settling.py", "    if ways.refunds:\n", "    if False:\n"),
    Break(
        "a rebuild gives old notes no refunds",
        "worker/folding/settling.py",
        "    yield from _pages_of_notes(cursor, account)\n",
        "",
    ),
    Break("a refund in another currency counts", NOTE, ' or refund["currency"] != currency:', ":"),
    Break(
        "parts that contradict each other are a guess",
        NOTE,
        "refunded, left = parts or (None, None)",
        "refunded, left = parts or (amount, None)",
    ),
    Break(
        "no lock on the change feed",
        "schemas/locks.py",
        "pg_advisory_xact_lock({_CHANGES})",
        "1",
    ),
    Break(
        "refold from the batch alone",
        "worker/folding/joining.py",
        "            if one.subject in found:\n",
        "            if one.subject in found and one.event_id in {e.event_id for s in at_hand.values() for e in s}:\n",
    ),
    Break(
        "parked events are folded along",
        "worker/folding/joining.py",
        "coalesce(o.state, %s) <> 'parked' OR (i.account",
        "%s <> '' OR (i.account",
    ),
    Break(
        "pending events are folded along",
        "worker/folding/joining.py",
        '"pending" if with_pending else "parked"',
        '"pending"',
    ),
    Break(
        "an event at hand brings those of its id in other worlds back",
        "worker/folding/joining.py",
        "OR (i.account, i.livemode, i.id) IN (\n                SELECT * FROM",
        "OR i.id IN (\n                SELECT k.id FROM",
    ),
    Break(
        "an event that fails alone is parked for any error",
        PROJECTION,
        "        if failure.is_of_data:\n",
        "        if failure:\n",
    ),
    Break(
        "an event that another worker folded is parked",
        PROJECTION,
        "        if claim(cursor, limit=1, only=(claimed.event.seq,)) != [claimed]:\n            return 0\n",
        "",
    ),
    Break("a batch that fails is dropped", PROJECTION, "apart.extendleft([seqs[half:], seqs[:half]])", "seqs[half:]"),
    Break(
        "a waiting event is not passed over", "worker/folding/claim.py", "(due_at IS NULL OR due_at <= now())", "true"
    ),
    Break(
        "anomalies of one id are one",
        "worker/folding/anomalies.py",
        "and (account, livemode, anomaly) not in held",
        "and anomaly not in {each for _, _, each in held}",
    ),
    Break(
        "no one is refunded",
        "worker/folding/order_refunds.py",
        "return _changes(cursor, _refunded(cursor, moved))",
        "return []",
    ),
    Break(
        "an announced change is announced again",
        "worker/folding/changes.py",
        "if cursor.fetchone() == (True,):",
        "if False:",
    ),
    Break("the old row is trusted", PROJECTION, "        if each.is_refold:\n", "        if False:\n"),
    Break(
        "changes at every event", SESSION, "if all(last.get(name) == now[name] for name in _CORRECTED_BY):", "if False:"
    ),
    Break(
        "no changes after the first", SESSION, "if all(last.get(name) == now[name] for name in _CORRECTED_BY):", "if 1:"
    ),
    Break("a step back is a one-shot", SESSION, "if is_onward and one_shot not in kinds", "if one_shot not in kinds"),
    Break("a one-shot is announced again", SESSION, "if is_onward and one_shot not in kinds", "if is_onward"),
    Break("lines are complete for ever", SESSION, "moved = was_complete and any(", "moved = False and any("),
    Break("lines that differ are right", SESSION, 'difference if laid["_lines_moved"] else None', "None"),
    Break("history is news", PROJECTION, 'withheld="fold_version"', "withheld=None"),
    Break(
        "news are history",
        PROJECTION,
        "_project(cursor, news, now, fold_version)",
        '_project(cursor, news, now, fold_version, withheld="fold_version")',
    ),
    Break(
        "a reading makes a moment earlier",
        JOIN,
        "for step in real_moments(path.steps):\n        anomalies",
        "for step in path.steps:\n        anomalies",
    ),
    Break("an advanced row keeps a reading's moment", JOIN, " or _may_be_of_a_reading(advanced, step)", ""),
    Break(
        "a reading begins the second that it saw",
        CHAIN,
        "before = _before_readings(earlier, edges, names, rules)",
        "before = earlier",
    ),
    Break("several events are laid over a reading", JOIN, "_is_after_a_reading(row, facts)", "False"),
    Break("a circle that is reported twice is no doubt", CHAIN, "is_ambiguous |= not best.is_countable", "pass"),
    Break("a ledger is as old as its last line", BALANCE, "max(step.created for step in steps)", "steps[-1].created"),
    Break(
        "a new event takes its object's history along", PROJECTION, "refold=past.refold | waiting", "refold=past.refold"
    ),
)


def main(words: list[str]) -> int:
    """Try every break, print the verdict, and return the number of breaks that the tests did not notice."""
    chosen = [each for each in BREAKS if not words or any(word in each.name for word in words)]
    survivors = 0
    with (
        tempfile.TemporaryDirectory(prefix="payfold-wrong-") as folder,
        embedded_services(Path(folder) / "services", durable=False) as services,
    ):
        environment = {**os.environ, "DATABASE_URL": services.database_url, "REDIS_URL": services.redis_url}
        for each in chosen:
            started = time.monotonic()
            noticed = _is_noticed(each, Path(folder) / "tree", environment)
            survivors += not noticed
            verdict = "noticed" if noticed else "NOT NOTICED"
            print(f"{verdict:<12}{time.monotonic() - started:>5.0f} s  {each.name}", flush=True)  # noqa: T201 - its output
    print(f"{len(chosen) - survivors} of {len(chosen)} wrong engines were noticed")  # noqa: T201 - as above
    return survivors


def _is_noticed(each: Break, tree: Path, environment: dict[str, str]) -> bool:
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("api", "deploy", "schemas", "tests", "worker"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "Procfile"):
        shutil.copy(ROOT / file, tree / file)
    path = tree / each.file
    text = path.read_text()
    if text.count(each.right) != 1:
        raise SystemExit(f"{each.name}: {each.file} does not hold once what is to be broken")
    path.write_text(text.replace(each.right, each.wrong))
    present = [test for test in TESTS if (tree / test).exists()]
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=1",
        *present,
    ]
    paths = {**environment, "PYTHONPATH": str(tree)}
    try:
        result = subprocess.run(run, cwd=tree, env=paths, capture_output=True, check=False, timeout=BREAK_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        # An engine that folds without end is wrong, so a timeout counts as noticed.
        return True
    if result.returncode not in (0, 1):
        raise SystemExit(f"{each.name}: the tests did not run\n{result.stdout.decode()[-2000:]}")
    return result.returncode == 1


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
