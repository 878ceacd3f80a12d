"""The parts of a reconciliation that were proven, and those that it did not look at."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from api.report.words import shown


def percent_proven(rules: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the share of the rows checked by *rules* that is proven, in whole percent, and the count of these rows.

    A row counts once for each rule that is about it, and is proven where the rule holds or is broken. The percentage is
    rounded down, so that 100 means all. None where no row was checked.
    """
    counts = [(rule["checked"], rule["not_provable"]) for rule in rules]
    checked, unproven = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return ((checked - unproven) * 100 // checked, checked) if checked else None


def in_part(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the parts that a reconciliation did not look at, by the check; a complete check is absent."""
    archived = (result.get("logs") or {}).get("archived")
    of_logs = [f"{archived:,} events of the logs are archived here"] if archived else []
    of_stripe = list(_left_at_stripe(result))
    return {check: left for check, left in (("log", of_logs), ("stripe", of_stripe)) if left}


def _left_at_stripe(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of Stripe's data that were not looked at, each once.

    The reason why a kind of object was not compared is a flag of its tally (``is_forbidden``), or stands in place of
    the kind's name.
    """
    tallies, since = result.get("stripe") or (), result["run"].get("since")
    if since is not None and (tallies or "stripe_error" in result):
        moment = since if isinstance(since, datetime) else datetime.fromisoformat(since)
        yield f"only what was created since {shown(moment)} UTC"
    yield from dict.fromkeys(words for tally in tallies for words in _left_of(tally))
    if "stripe_error" in result:
        yield f"stopped by {result['stripe_error']['kind']}"


_NOT_ASKED: Final = "not asked"


def _left_of(tally: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of one *tally*'s objects that were not looked at."""
    kind = str(tally["object"])
    if kind.startswith(_NOT_ASKED):
        account, mode = tally["account"], "live" if tally["livemode"] else "test"
        yield f"{f'{account}, {mode}' if account else f'{mode} mode'}: {kind}"
    if known := tally.get("sampled_of"):
        looked_at, what = (tally["sampled"], " customers") if "sampled" in tally else (tally["listed"], "")
        yield f"{kind}: {looked_at:,} of {known:,}{what}"
    if without := tally.get("without_lines"):
        yield f"{kind}: lines of {without:,} not compared"
    if tally.get("cut_short"):
        yield f"{kind}: cut short"
    if unreadable := tally.get("unreadable"):
        yield f"{kind}: without {unreadable:,} that could not be read"
    for name, value in tally.items():
        if value is True and name.startswith("is_"):
            yield f"{kind}: {name.removeprefix('is_').replace('_', ' ')}"
        elif isinstance(value, str) and name != "object" and value.startswith(_NOT_ASKED):
            yield f"{kind}: {value}"


def why_not_provable(rule: Mapping[str, Any]) -> str:
    """Return for how many rows a *rule* could not be proven, and the reasons; empty where it was for all."""
    if not rule["not_provable"]:
        return ""
    why = ", ".join(f"{each['rows']:,} {each['reason']}" for each in rule.get("reasons", ()))
    return f"{rule['not_provable']:,} of {rule['checked']:,} not provable" + (f": {why}" if why else "")
