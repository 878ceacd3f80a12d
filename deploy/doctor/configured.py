"""Checks of the settings alone: names, values, secrets, keys, tokens and labels."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from deploy.doctor.findings import Finding, counted, fault, skipped, warning
from schemas.settings import Settings

SETTINGS: Final = "settings"
SECRETS: Final = "signing secrets"
KEYS: Final = "API keys"
TOKENS: Final = "tokens"
LABELS: Final = "labels"
CHARACTERS_MIN: Final = 16
"""Behind its prefix Stripe never writes fewer characters in a secret or in a key; an example has fewer."""
_PREFIX: Final = re.compile(r"whsec_|[sr]k_(?:live|test)_")


def names(unknown: Sequence[str], settings: Settings) -> Iterator[Finding]:
    """Judge the names that look like settings and are none, each with its sentence, and what no process starts without.

    A finding of these is an error of configuration.
    """
    for sentence in unknown:
        found, _, hint = sentence.partition("; ")
        yield fault(SETTINGS, found, f"Take it away, or correct its name: {hint}")
    for name in ("DATABASE_URL", "REDIS_URL"):
        if getattr(settings, name.lower()) is None:
            example = (Settings.model_fields[name.lower()].examples or [""])[0]
            yield fault(
                SETTINGS, f"{name} is not set, and no process starts without it", f"Set it, as {name}={example}"
            )


def unusable(error: str) -> Iterator[Finding]:
    """Yield what *error* of ``Settings.load`` reports: a line for each value that cannot be used."""
    for line in error.splitlines():
        found, _, example = line.partition(" Example: ")
        yield fault(SETTINGS, found.removesuffix("."), f"Write it as {example}" if example else "Correct it.")


def in_force(settings: Settings) -> str:
    """Return how many settings there are, and how many differ from their defaults."""
    known = len(Settings.model_fields)
    given = len(settings.model_fields_set)
    return f"{given} of {known} are set, and no name is unknown"


def secrets(settings: Settings) -> Iterator[Finding]:
    """Judge the signing secrets."""
    known = settings.signing_secrets
    if not known:
        yield fault(
            SECRETS,
            "STRIPE_WEBHOOK_SECRETS is not set, so every delivery is refused",
            "Set it to the endpoint's signing secret, from Stripe's Dashboard or from:\n"
            "  payfold endpoints create --url https://YOUR-HOST/webhooks/stripe --yes",
        )
        return
    texts = [each.secret.decode() for each in known]
    yield from _short(SECRETS, texts, "STRIPE_WEBHOOK_SECRETS")
    if len(set(texts)) < len(texts):
        yield warning(
            SECRETS,
            "one secret is given twice: what it signs is recorded under the first label alone",
            "Keep the entry with the label of its account, and take the other away.",
        )


def secrets_in_words(settings: Settings) -> str:
    """Return how many secrets there are, and their labels."""
    return f"{counted(len(settings.signing_secrets), 'secret')}, {_labels(settings.signing_secrets)}"


def keys(settings: Settings) -> Iterator[Finding]:
    """Judge the form of the API keys, and whether they are of one mode."""
    known = settings.api_keys
    if not known:
        yield skipped(
            KEYS,
            "STRIPE_API_KEY is not set, so nothing is asked of Stripe",
            "With a restricted key Payfold expires stale sessions, reads line items and finds events that never came.",
        )
        return
    yield from _short(KEYS, [each.secret for each in known], "STRIPE_API_KEY")
    if len({each.livemode for each in known}) > 1:
        yield warning(
            KEYS,
            "live and test keys are together, so that test and live rows share a database, each under its mode",
            "Nothing is to be done where that is meant. Else take the keys of the other mode away.",
        )


def keys_in_words(settings: Settings) -> str:
    """Return how many keys there are, their modes and labels, and where they are used if that is not Stripe."""
    known = settings.api_keys
    mode = "live" if known and known[0].livemode else "test"
    default = Settings.model_fields["stripe_api_base"].default
    elsewhere = "" if settings.stripe_api_base == default else f", used at {settings.stripe_api_base}"
    return f"{counted(len(known), f'{mode} key')}, {_labels(known)}{elsewhere}"


def _short(check: str, texts: Sequence[str], name: str) -> Iterator[Finding]:
    short = sum(len(_PREFIX.sub("", text, count=1)) < CHARACTERS_MIN for text in texts)
    if short:
        yield warning(
            check,
            f"{short} of {len(texts)} in {name} {'is' if short == 1 else 'are'} shorter than any that Stripe makes",
            "Copy it again, whole, from Stripe's Dashboard.",
        )


def tokens(settings: Settings) -> Iterator[Finding]:
    """Judge the bearer tokens."""
    if not settings.tokens:
        yield warning(
            TOKENS,
            "none is configured, so the pages and all routes but the webhook and health are closed",
            "Make one, and add the entry that it prints to PAYFOLD_TOKENS:\n"
            "  payfold tokens new operator --scope admin+personal",
        )
    for token in settings.tokens:
        if token.scopes == {"personal"}:
            yield warning(
                TOKENS,
                f"{token.name} has the scope personal alone, which opens no route",
                f"Make it again with another scope too:\n  payfold tokens new {token.name} --scope read+personal",
            )


def tokens_in_words(settings: Settings) -> str:
    """Return the holders of tokens and their scopes."""
    return ", ".join(f"{each.name} ({'+'.join(sorted(each.scopes))})" for each in settings.tokens)


def labels(settings: Settings, renamed: Mapping[str, str]) -> Iterator[Finding]:
    """Judge the labels of secrets and keys by themselves, and next to the *renamed* accounts: the new name by the old.

    What the inbox shows about them is judged apart.
    """
    of_secrets = {each.account for each in settings.signing_secrets}
    if "" in of_secrets and len(of_secrets) > 1:
        others = ", ".join(sorted(of_secrets - {""}))
        yield warning(
            LABELS,
            f"a secret in STRIPE_WEBHOOK_SECRETS has no label, and others have ({others})",
            f"If it is of the same account as {others}, give it that label, else an order is split in two. If it is of"
            " another account, nothing is to be done.",
        )
    given = of_secrets | {each.account for each in settings.api_keys}
    for old in sorted(given & renamed.keys()):
        yield warning(
            LABELS,
            f"the label {old or chr(39) * 2} was renamed to {renamed[old]}, and is still in the settings",
            f"Its events are recorded under {renamed[old]}. Write that label in STRIPE_WEBHOOK_SECRETS and"
            " STRIPE_API_KEY.",
        )


def _labels(of: Sequence[object]) -> str:
    found = Counter(getattr(each, "account", "") for each in of)
    return ", ".join(label or "without a label" for label in sorted(found))
