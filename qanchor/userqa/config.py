"""Options of `qanchor userqa`. Keys are no option: they come from the environment alone."""

from pathlib import Path
from typing import Literal

from qanchor.config import Config
from qanchor.errors import ConfigError


def check_base_url(field: str, url: str) -> None:
    """Raise ConfigError for what is no plain http(s) URL; one with a password would be saved."""
    if not url.startswith(("http://", "https://")):
        rule = "must start with http:// or https://"
        raise ConfigError(field, url, rule, "e.g. http://localhost:8000/v1")
    if "@" in url:
        rule = "must not hold a user or password"
        raise ConfigError(field, "(hidden)", rule, "put the key into the environment")


def _check_least(field: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError(field, value, f"must be at least {least}", f"try {least}")


class EndpointConfig(Config, frozen=True, kw_only=True):
    """Which language model is asked, and how."""

    base_url: str = ""
    """E.g. http://localhost:8000/v1. Empty: OPENAI_BASE_URL, else OpenAI's own."""
    model: str = ""
    """Name as the endpoint knows it. Empty: OPENAI_MODEL, else the built-in generator is used."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    temperature: float | None = 0.7
    """null: not sent, for models that refuse it."""
    max_reply_tokens: int = 3000
    """Longest reply asked for; the budget reserves as many before each request."""
    reply_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls `max_reply_tokens`; newer OpenAI models want the second."""
    json_mode: bool = True
    """Send response_format=json_object; switch off where the endpoint does not know it."""
    concurrency: int = 16
    """Requests on the way at the same time, waiting for a retry included."""
    timeout_seconds: float = 120.0
    """Longest wait for one reply; a timeout is retried."""
    max_retries: int = 6
    """Tries after the first for status 429, 5xx, timeouts and broken connections, with growing,
    jittered pauses of 0.5 to 8 s, or as Retry-After says up to 2 minutes."""
    max_failures_in_a_row: int = 10
    """So many requests that failed for good, without one success between: the run stops."""

    def __post_init__(self) -> None:
        if self.base_url:
            check_base_url("endpoint.base_url", self.base_url)
        for name in ("max_reply_tokens", "concurrency", "timeout_seconds", "max_failures_in_a_row"):
            _check_least(f"endpoint.{name}", getattr(self, name), 1)
        _check_least("endpoint.max_retries", self.max_retries, 0)


class BudgetConfig(Config, frozen=True, kw_only=True):
    """What the replies stored in one output directory may cost, all its runs together."""

    max_tokens: int | None = None
    """Prompt and reply tokens; null: no limit."""
    max_cost: float | None = None
    """In the currency of the prices; null: no limit."""
    price_in_per_million: float = 0.0
    """Price of a million prompt tokens."""
    price_out_per_million: float = 0.0
    """Price of a million reply tokens."""

    def __post_init__(self) -> None:
        for name in ("price_in_per_million", "price_out_per_million"):
            _check_least(f"budget.{name}", getattr(self, name), 0)
        if self.max_cost is not None and not self.price_in_per_million + self.price_out_per_million:
            rule = "needs a price, both prices are 0"
            raise ConfigError(
                "budget.max_cost", self.max_cost, rule, "set budget.price_in_per_million"
            )


class UserQaConfig(Config, frozen=True, kw_only=True):
    """One synthesis; saved as config.json beside what it makes."""

    endpoint: EndpointConfig = EndpointConfig()
    budget: BudgetConfig = BudgetConfig()
    builtin: bool = False
    """Use the built-in generator even where an endpoint is configured: nothing leaves."""
    pool: str = "life"
    """Topics a language model picks from. `life`: 72 of everyday life; `dataset`: the data set's
    own; else the path of a TOML file like life.toml. The built-in generator knows its own only."""
    num_topics: int = 10
    """Topics picked per user, so at most as many triples."""
    num_future: int = 0
    """Rule-made future triples added per train user, as `qanchor data triples --future` does."""
    with_valid: bool = False
    """Users of split valid too, to watch training by; `qanchor pretrain` refuses such a file."""
    max_users: int | None = None
    """Only the first so many users, to try things; null: all."""
    max_mendings: int = 2
    """Times a malformed reply is asked for again before its items are given up."""
    seed: int = 0
    """Of future triples, built-in answers, and topics filled in for a failed pick."""

    def __post_init__(self) -> None:
        _check_least("num_topics", self.num_topics, 1)
        _check_least("num_future", self.num_future, 0)
        _check_least("max_mendings", self.max_mendings, 0)
        if self.max_users is not None:
            _check_least("max_users", self.max_users, 1)
        if self.pool not in ("life", "dataset") and not Path(self.pool).is_file():
            rule = "must be life, dataset or a TOML file"
            raise ConfigError("pool", self.pool, rule, "correct the path")
