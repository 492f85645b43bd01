"""The demonstration behind `make demo`: every verb of `qanchor` once, then questions over gRPC.

Simulated users (`wallet`), a small model trained on them, its ONNX bundle, a server, ten scenario
questions about several users in one stream, and the proof that the answers are right.
"""

import argparse
import logging
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qanchor.checkpoint import Checkpoint, load_checkpoint
from qanchor.client import Client, EmbedRequestItem, EmbedResult
from qanchor.data.dataset import Dataset, open_dataset
from qanchor.eval.embed import embed_users, segment_of
from qanchor.eval.probe import ProbeResult, linear_probe
from qanchor.eval.splits import chosen_users, judged_users
from qanchor.train.batches import anchor_batch
from qanchor.train.setup import render_users, tokenized

NUM_USERS_ASKED = 5
TOLERANCE = 1e-4
START_SECONDS = 120
FULL_PASS_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Answers:
    """What the server said: the same questions to the same users, twice."""

    first: dict[str, EmbedResult]
    second: dict[str, EmbedResult]


def main() -> int:
    """Run every stage; exit 1 if an answer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    started = time.monotonic()
    output: Path = args.output
    shutil.rmtree(output, ignore_errors=True)
    data, run, bundle = output / "data", output / "run", output / "bundle"
    qanchor(f"data wallet {data} --users {args.users} --seed 1")
    qanchor(f"data validate {data}")
    qanchor(f"pretrain {data} {run} --set train.steps={args.steps} --set train.warmup_steps=50")
    qanchor(f"export {run}/checkpoint {bundle}")
    qanchor(f"verify {bundle} --checkpoint {run}/checkpoint")
    opened = open_dataset(data)
    dataset = judged_users(opened, opened.user_ids()).narrowed(opened)
    trained, untrained = load_checkpoint(run / "checkpoint"), load_checkpoint(run / "untrained")
    probes = [probe_all(checkpoint, dataset) for checkpoint in (trained, untrained)]
    users = dataset.user_ids("test")[:NUM_USERS_ASKED]
    with serving(bundle, output / "profiles") as address:
        answers = ask(address, dataset, users)
    is_right = report(trained, dataset, answers, probes)
    say(f"done in {(time.monotonic() - started) / 60:.1f} minutes; everything lies in {output}/")
    return 0 if is_right else 1


def say(text: str) -> None:
    """One headline of the demonstration."""
    print(f"\n== {text}", flush=True)


def qanchor(command: str) -> None:
    """Show and run one `qanchor` command; stops the demonstration if it fails."""
    say(f"qanchor {command}")
    subprocess.run([sys.executable, "-m", "qanchor.cli", *shlex.split(command)], check=True)


@contextmanager
def serving(bundle: Path, profiles: Path) -> Iterator[str]:
    """A server on a free port of this machine, as a process of its own; yields its address."""
    with tempfile.TemporaryDirectory() as directory:
        port_file = Path(directory) / "port"
        where = f"--address 127.0.0.1:0 --data-dir {profiles} --port-file {port_file}"
        command = f"serve {bundle} {where}"
        say(f"qanchor {command}")
        server = subprocess.Popen([sys.executable, "-m", "qanchor.cli", *shlex.split(command)])
        try:
            deadline = time.monotonic() + START_SECONDS
            while not port_file.is_file() or not port_file.read_text().strip():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("demo: the server did not start; its reason is above")
                time.sleep(0.1)
            yield f"127.0.0.1:{port_file.read_text().strip()}"
        finally:
            server.terminate()
            server.wait(timeout=60)


def ask(address: str, dataset: Dataset, users: Sequence[str]) -> Answers:
    """Put the users' profiles, then ask all scenarios about all users in one stream, twice."""
    scenarios = tuple(scenario.name for scenario in dataset.scenarios)
    items = [EmbedRequestItem(request_id=user, user_id=user, scenarios=scenarios) for user in users]
    with Client(address) as client:
        for profile in dataset.profiles(user_ids=list(users)):
            client.put_profile(profile)
        say(f"one stream: {len(scenarios)} scenarios x {len(users)} users; then once more")
        rounds = [
            {reply.request_id: reply.unwrap() for reply in client.stream_embed(items, timeout=60)}
            for _ in range(2)
        ]
    return Answers(*rounds)


def probe_all(checkpoint: Checkpoint, dataset: Dataset) -> list[ProbeResult]:
    """A linear probe per scenario on the checkpoint's embeddings of all users."""
    say(f"embed all users at step {checkpoint.meta.step} and fit a linear probe per scenario")
    rendered = render_users(dataset, chosen_users(dataset, max_users=0))
    judged = judged_users(dataset, rendered.user_ids)
    questions = [scenario.question for scenario in dataset.scenarios]
    embeddings_UQZ = embed_users(checkpoint, rendered, questions)
    return [
        linear_probe(judged.split_data(scenario.name, embeddings_UQZ[:, index]))
        for index, scenario in enumerate(dataset.scenarios)
    ]


def report(
    checkpoint: Checkpoint, dataset: Dataset, answers: Answers, probes: list[list[ProbeResult]]
) -> bool:
    """Print the final tables; True when every served vector equals its full torch pass."""
    rendered = render_users(dataset, list(answers.first))
    users = list(rendered.user_ids)
    questions = [scenario.question for scenario in dataset.scenarios]
    full_UQZ = embed_users(checkpoint, rendered, questions)
    differences = [
        float(np.abs(answer.vectors - full_UQZ[row]).max())
        for round_ in (answers.first, answers.second)
        for row, answer in ((users.index(user), answer) for user, answer in round_.items())
    ]
    say("probability by the probe, per scenario and user; AUC / KS on all test users")
    print_scenarios(dataset, answers, probes)
    say("where the time went (milliseconds)")
    print_timings(answers)
    full_ms = full_pass_ms(checkpoint, dataset, users[0], questions)
    cached_ms = 1e3 * min(answer.provenance.suffix_seconds for answer in answers.second.values())
    say("proof and gain")
    worst = max(differences)
    verdict = "equal" if worst <= TOLERANCE else "NOT EQUAL"
    print(f"served vectors against full torch passes: {verdict}, largest difference {worst:.1e}")
    print(
        f"{len(questions)} queries of a cached user {cached_ms:.1f} ms, "
        f"{len(questions)} full torch passes {full_ms:.1f} ms: {full_ms / cached_ms:.1f} x"
    )
    return worst <= TOLERANCE


def print_scenarios(dataset: Dataset, answers: Answers, probes: list[list[ProbeResult]]) -> None:
    """Ten scenarios x users, and beside them how good the probe is."""
    users = list(answers.second)
    names = "".join(f"{'user ' + user:>11}" for user in users)
    print(f"{'scenario':14}{names}     Q-Anchor        untrained")
    for index, scenario in enumerate(dataset.scenarios):
        rows = np.stack([answers.second[user].vectors[index] for user in users])
        cells = "".join(f"{probability:11.2f}" for probability in probes[0][index].score(rows))
        shown = "   ".join(f"{probe[index].auc:.3f} / {probe[index].ks:.3f}" for probe in probes)
        print(f"{scenario.name:14}{cells}   {shown}")
    averages = "   ".join(
        f"{np.mean([one.auc for one in probe]):.3f} / {np.mean([one.ks for one in probe]):.3f}"
        for probe in probes
    )
    print(f"{'average':14}{' ' * 11 * len(users)}   {averages}")


def print_timings(answers: Answers) -> None:
    """Cache state and time split of both rounds, user by user."""
    names = f"{'queue':>8}{'prefill':>9}{'suffix':>8}"
    print(f"{'user':8}{'round':8}{'prefix':>8}  {'cache state':14}{names}")
    for name, round_ in (("first", answers.first), ("second", answers.second)):
        for user, answer in round_.items():
            seen = answer.provenance
            times = (seen.queue_seconds, seen.prefill_seconds, seen.suffix_seconds)
            queue, prefill, suffix = (1e3 * seconds for seconds in times)
            print(
                f"{user:8}{name:8}{seen.num_prefix_tokens:8d}  {seen.cache_state.name.lower():14}"
                f"{queue:8.1f}{prefill:9.1f}{suffix:8.1f}"
            )


def full_pass_ms(
    checkpoint: Checkpoint, dataset: Dataset, user: str, questions: Sequence[str]
) -> float:
    """Milliseconds of one full torch pass per question, without any cache (best of some)."""
    import torch

    corpus = tokenized(checkpoint, render_users(dataset, [user]))
    batches = [
        anchor_batch(corpus, [0], [[segment_of(checkpoint, question)]]) for question in questions
    ]
    best = float("inf")
    with torch.inference_mode():
        for _ in range(FULL_PASS_REPEATS):
            start = time.perf_counter()
            for batch in batches:
                checkpoint.model.anchor(batch)
            best = min(best, time.perf_counter() - start)
    return 1e3 * best


if __name__ == "__main__":
    sys.exit(main())
