"""Resolving queries: scenarios once, free text within limits."""

import asyncio
import dataclasses

import pytest
from fake_engine import fake_bundle

from qanchor.bundle.reader import Bundle
from qanchor.config import Scenario
from qanchor.errors import BundleError, InvalidInput
from qanchor_server.resolve import ResolvedQuery, Resolver


@pytest.fixture
def resolver() -> Resolver:
    return Resolver(fake_bundle(), max_cached_queries=2)


def with_scenario(scenario: Scenario) -> Bundle:
    return dataclasses.replace(fake_bundle(), scenarios=(scenario,))


def test_a_scenario_is_its_question_in_the_template_and_its_soft_prompt(resolver: Resolver) -> None:
    tuned = resolver.scenario("tuned", "q")
    assert tuned.suffix.token_ids == (5, 6, 4)
    assert tuned.suffix.suffix_len == 6
    assert tuned.suffix.prompt_rows_KD is not None
    assert tuned.suffix.prompt_rows_KD.tolist() == [[1, 2, 3], [4, 0, 0]]


def test_a_compiled_scenario_sends_no_text() -> None:
    rows = ((1.0, 2.0, 3.0), (4.0, 0.0, 0.0))
    compiled = Scenario(name="x", question="tea " * 10, soft_prompt=rows, is_compiled=True)
    resolver = Resolver(with_scenario(compiled), max_cached_queries=1)
    suffix = resolver.scenario("x", "q").suffix
    assert suffix.token_ids == ()
    assert suffix.suffix_len == 3


def test_an_unknown_scenario_names_the_nearest_one(resolver: Resolver) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'coffee_fan'") as caught:
        resolver.scenario("cofee_fan", "queries[1].scenario")
    assert caught.value.field == "queries[1].scenario"


def ask(resolver: Resolver, text: str) -> ResolvedQuery:
    return asyncio.run(resolver.text(text, "q"))


def test_free_text_is_tokenised_once_while_it_is_among_the_newest(resolver: Resolver) -> None:
    first = ask(resolver, "tea")
    assert ask(resolver, "tea") is first
    ask(resolver, "shoes")
    ask(resolver, "coffee")
    assert ask(resolver, "tea") is not first


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "empty"), ("  ", "empty"), ("tea " * 10, "12 tokens"), ("x" * 1000, "704 characters")],
)
def test_free_text_out_of_bounds_is_rejected(resolver: Resolver, text: str, rule: str) -> None:
    with pytest.raises(InvalidInput, match=rule):
        ask(resolver, text)
    assert len(ask(resolver, "tea " * 9).suffix.token_ids) == 11


def test_a_scenario_beyond_the_models_limits_refuses_to_load() -> None:
    with pytest.raises(BundleError, match="12 tokens, at most 11"):
        Resolver(with_scenario(Scenario(name="x", question="tea " * 10)), max_cached_queries=1)
    rows = ((1.0, 2.0, 3.0),)
    long = Scenario(name="x", question="tea " * 9, soft_prompt=rows)
    with pytest.raises(BundleError, match="13 suffix tokens"):
        Resolver(with_scenario(long), max_cached_queries=1)
    wide = Scenario(name="x", question="tea", soft_prompt=((1.0, 2.0),))
    with pytest.raises(BundleError, match="hidden_dim is 3"):
        Resolver(with_scenario(wide), max_cached_queries=1)
