"""How a request or a user can end, and the counts of a run."""

from dataclasses import dataclass

from qanchor.config import Config
from qanchor.errors import QAnchorError


class Unfinished(QAnchorError):
    """Not now: the budget is spent or the endpoint fails. Another run may go on."""


class Refused(QAnchorError):
    """The endpoint will not answer this request, whenever it is asked."""


@dataclass(slots=True)
class Tally:
    """Counts that grow during a run. For one event loop."""

    num_requests: int = 0
    """Sent in this run; the client's own retries count once."""
    num_replies_from_store: int = 0
    num_replies_without_usage: int = 0
    num_malformed_pick: int = 0
    num_malformed_draft: int = 0
    num_malformed_reflect: int = 0
    num_topics_picked: int = 0
    num_topics_filled_in: int = 0
    num_drafted: int = 0
    num_draft_missing: int = 0
    num_kept: int = 0
    num_revised: int = 0
    num_dropped: int = 0
    num_verdict_missing: int = 0
    num_users: int = 0
    num_users_without_triples: int = 0
    num_users_refused: int = 0
    num_users_unfinished: int = 0


class Report(Config, frozen=True, kw_only=True):
    """What a run did; saved as report.json. Counts of answers cover all users of the file."""

    dataset: str
    author: str
    """The model's name, or `builtin`."""
    num_pool_topics: int
    num_users: int
    """Users gone through, in whatever way they ended."""
    num_users_without_triples: int
    """Ended, but with nothing to keep; those without any profile text among them."""
    num_users_refused: int
    """The endpoint refused a request of theirs, e.g. as too long; they have no triples."""
    num_users_unfinished: int
    """Left for another run; they have no triples in this file."""
    num_topics_picked: int
    num_topics_filled_in: int
    """Drawn from the pool because the language model did not name enough of it."""
    num_drafted: int
    num_draft_missing: int
    """Topics without a usable draft after all mendings."""
    num_kept: int
    num_revised: int
    """Answers that reflection changed."""
    num_dropped: int
    """Answers that reflection dropped."""
    num_verdict_missing: int
    """Answers dropped because reflection gave no usable verdict after all mendings."""
    num_malformed_pick: int
    """Replies that had to be asked for again, or given up; likewise the next two."""
    num_malformed_draft: int
    num_malformed_reflect: int
    num_uqa: int
    """Triples in the file, likewise num_future."""
    num_future: int
    num_requests: int
    """Sent in this run."""
    num_replies_from_store: int
    """Answered from the store, without a request."""
    num_replies_without_usage: int
    """The endpoint counted no tokens; they are estimated."""
    num_tokens_in: int
    """Of all runs in this directory, likewise tokens out and cost."""
    num_tokens_out: int
    cost: float
    stopped_by: str
    """Empty: went through. `max_tokens` or `max_cost`: the budget; `endpoint`: it kept failing."""
    seconds: float

    @property
    def is_complete(self) -> bool:
        """It went through, and no user is left for another run."""
        return self.num_users_unfinished == 0 and not self.stopped_by
