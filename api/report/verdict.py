"""The words on the whole of a reconciliation: its verdict, and the parts that it leaves out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from api.report import results
from api.report.words import counted, listed, signed, world

Row: TypeAlias = Mapping[str, Any]
"""An object of the result: its values are any JSON."""

VERDICT_CURRENCIES_MAX: Final = 5
"""At most this many currencies are named in the verdict."""

CHECKS: Final = {
    "rules": ("Money rules", "Money by its own arithmetic: the rows of the tables against each other."),
    "rebuild": (
        "Rebuild",
        "The tables against a rebuild with the same folds, which finds lost and changed rows and not a wrong reading.",
    ),
    "log": ("Event logs", "The recorded events against the logs that were given."),
    "stripe": ("Stripe", "The tables against what Stripe's API answers now."),
}


_BADGES: Final = {"ok": "no drift", "incomplete": "no drift found, incomplete"}


def verdict(found: Row) -> str:
    """Return the result in one sentence."""
    total = found["drift_total"]
    if found["run"]["outcome"] != "drift" and not total:
        # Only a rebuild proves this sentence; the other checks merely find no difference.
        is_shown = "rebuild" in found["run"]["checks"]
        return "The tables are what the events say." if is_shown else "No difference was found."
    money = [signed(each["amount"], each["currency"]) for each in found["drift_money"] if each["currency"]]
    if (more := len(money) - VERDICT_CURRENCIES_MAX) > 0:
        money[VERDICT_CURRENCIES_MAX:] = [f"amounts in {more:,} more"]
    return f"{counted(total, 'difference')}, {f'in total {listed(money)}' if money else 'none of them in money'}."


def badge(found: Row) -> str:
    """Return whether there is drift, and how much of what the rules checked is proven."""
    proven = results.percent_proven(found.get("rules", ()))
    words = [_BADGES.get(found["run"]["outcome"], "drift")]
    if proven is not None:
        percent, checked = proven
        words.append(f"proven: {percent} % of {checked:,} checked by rules")
    return "; ".join(words)


def caveats(found: Row) -> str:
    """Return sentences on what the verdict leaves out."""
    in_part = results.in_part(found)
    left = [name for name in CHECKS if name not in found["run"]["checks"] and name not in in_part]
    open_results = unproven(found)
    waiting = found["events"]["parked"] + found["events"]["pending"]
    sentences = [f"Not checked: {listed(CHECKS[name][0] for name in left)}."] if left else []
    sentences += [f"{CHECKS[name][0]}: only in part ({'; '.join(words)})." for name, words in in_part.items()]
    if not left and not in_part and "left_out" not in found:
        sentences.append("Everything was checked.")
    if open_results:
        sentences.append(f"{counted(open_results, 'result')} of the rules could not be proven either way.")
    if "left_out" in found:
        left_out = found["left_out"]
        sentences.append(
            f"Not rebuilt: {counted(left_out['objects'], 'object')} of {counted(left_out['events'], 'archived event')}."
        )
    if "repaired" in found:
        sentences.append(f"Before this run's repair there {_were(found['repaired']['drift_total'])}.")
    if waiting:
        sentences.append(f"{counted(waiting, 'recorded event')} {'is' if waiting == 1 else 'are'} in no table yet.")
    return " ".join(sentences)


def _were(count: int) -> str:
    return f"{'was' if count == 1 else 'were'} {counted(count, 'difference')}"


def unproven(found: Row) -> int:
    """Return how many results of the rules prove nothing."""
    return sum(rule["not_provable"] for rule in found.get("rules", ()))


def notes_on_stripe(tallies: Sequence[Row]) -> Iterator[str]:
    """Yield sentences on the objects that the comparison with Stripe left out, and on faults that no repair mends."""
    if archived := sum(each.get("archived", 0) for each in tallies):
        yield f"{archived:,} rows could not be folded again with what Stripe lists: their events are archived."
    if unreadable := sum(each.get("unreadable", 0) for each in tallies):
        yield f"{unreadable:,} of Stripe's objects could not be read, and were not compared."
    for each in tallies:
        yield from _notes_on(each)
    if only := sum(each.get("only_by_map", 0) for each in tallies):
        yield (
            f"Different by the map alone: {only:,}. Folding what Stripe lists would leave these rows as they are, and "
            "no repair puts them right: a fold reads a column from the wrong place, or an event in the inbox reports "
            "what Stripe does not."
        )
    if unstated := sum(each.get("unstated", 0) for each in tallies):
        yield f"{unstated:,} values that Stripe lists are not in the recorded events, of an older API version."


def _notes_on(tally: Row) -> Iterator[str]:
    """Yield sentences on the parts of one *tally* that were left out."""
    if tally.get("is_forbidden"):
        yield f"{tally['object']} was not compared: the API key may not list it."
    if tally.get("reason"):
        yield f"{world(tally)}: {tally['object']}. {tally['reason']}"
    if tally.get("sampled_of"):
        yield f"{tally['object']}: a sample, {_sampled(tally)} were looked at; --seed N chooses another."
    if without := tally.get("without_lines"):
        yield f"{tally['object']}: lines of {without:,} were not compared, since Stripe lists only a part of them."
    if tally.get("cut_short"):
        yield f"{tally['object']}: the list was cut short, and older rows were not compared."


def _sampled(tally: Row) -> str:
    known = tally["sampled_of"]
    if "sampled" in tally:
        return f"the ledgers of {tally['sampled']:,} of {known:,} customers"
    return f"{tally['listed']:,} of {known:,}"
