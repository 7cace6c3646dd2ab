"""Rewards of small problems whose best value is 1."""


def arm(prompts: list, responses: list[str]) -> list[float]:
    """A bandit: one arm pays 1, some pay half, the others nothing."""
    return [1.0 if r[:1] == "a" else 0.5 * (r[:1] in tuple("bcdefgh")) for r in responses]


def says_a(prompts: list, responses: list[str]) -> list[float]:
    """The share of eight tokens that are "a"."""
    return [r.count("a") / 8 for r in responses]


def letters(prompts: list, responses: list[str]) -> list[float]:
    """The share of eight tokens that are small letters: most responses differ in it."""
    return [sum("a" <= c <= "z" for c in r) / 8 for r in responses]


def nothing(prompts: list, responses: list[str]) -> list[float]:
    return [0.0] * len(responses)
