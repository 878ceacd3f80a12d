"""Text that a stranger may have written, made safe to look at."""


def visible(text: str) -> str:
    """Return *text* with control and invisible characters spelled out, line breaks left.

    A buyer's name could otherwise send control codes to a terminal, or turn the direction of a line on a page.
    """
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
