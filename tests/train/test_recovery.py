"""Bad steps of real runs: computed again, left out, rewound."""

from __future__ import annotations

from pathlib import Path

from faults.test_faults import ALONE, events, train
from logged import numbers

from megahp import checkpoint
from megahp.log.replay import replay


def test_what_is_not_finite_again_is_named_and_left_out(folder: Path) -> None:
    """A sample that gives no number, on whichever rank has it: once computed again, then the step is skipped."""
    lasting = ({"kind": "lasting", "rank": 1, "sample": 31, "times": float("nan")},)
    code, said = train(folder, "lasting", "--ranks", "2", faults=lasting)
    assert code == 0, said
    (skipped,) = events(folder, "lasting", "skipped")
    assert skipped["step"] == 7 and skipped["samples"] == [28, 31]
    assert "output of the stage's end is not finite on rank 1, microbatch 0" in skipped["reason"]
    records = numbers(folder / "runs/lasting")
    assert [record["step"] for record in records if record.get("skipped")] == [8] and len(records) == 40
    state = checkpoint.read_state(checkpoint.complete(folder / "runs/lasting/checkpoints")[-1])
    assert (state["skipped"], state["updates"]) == (1, 39)


def test_a_spike_is_told_or_left_out(folder: Path) -> None:
    spike = ({"kind": "lasting", "rank": 0, "sample": 81, "times": 9.0},)
    for policy, updates in (("tell", 40), ("skip", 39)):
        words = (*ALONE, "--ranks", "1", "--restarts", "0", f"resilience.spikes={policy}")
        code, said = train(folder, policy, *words, faults=spike)
        assert code == 0, said
        (told,) = events(folder, policy, "spike")
        assert told["step"] == 20 and told["reason"].startswith("loss ")
        skipped = events(folder, policy, "skipped")
        assert [event["samples"] for event in skipped] == ([[80, 83]] if policy == "skip" else [])
        told = [record["step"] for record in numbers(folder / "runs" / policy) if record.get("skipped")]
        assert told == ([21] if policy == "skip" else [])
        state = checkpoint.read_state(checkpoint.complete(folder / "runs" / policy / "checkpoints")[-1])
        assert state["updates"] == updates


def test_a_rewind_goes_back_and_past_the_samples(folder: Path) -> None:
    """And is itself gone on with exactly, after a kill."""
    spike = {"kind": "lasting", "rank": 0, "sample": 81, "times": 9.0}
    kill = {"kind": "kill", "rank": 0, "step": 29}
    words = (*ALONE, "--ranks", "1", "--restarts", "3", "resilience.spikes=rewind", "checkpoint.every=6")
    # so that the newest checkpoint is written when the spike, and the kill, come
    pauses = tuple({"kind": "pause", "rank": 0, "step": step} for step in (20, 28))
    for name, faults in (("rewound", (spike, *pauses)), ("rewound and killed", (spike, *pauses, kill))):
        code, said = train(folder, name, *words, faults=faults)
        assert code == 0, said
        (rewound,) = events(folder, name, "rewound")
        assert rewound["step"] == 18 and rewound["samples"] == 84
        assert replay(folder / "runs" / name).differences == []
        records = numbers(folder / "runs" / name)
        assert [record["step"] for record in records] == list(range(1, 41))
        assert records[-1]["samples"] == 160 + (84 - 4 * rewound["step"])
    assert numbers(folder / "runs/rewound") == numbers(folder / "runs/rewound and killed")
    assert len(events(folder, "rewound and killed", "resumed")) == 1


def test_rewinds_that_do_not_help_end_the_run(folder: Path) -> None:
    lasting = tuple({"kind": "lasting", "rank": 0, "sample": number, "times": 9.0} for number in range(81, 600, 4))
    words = (*ALONE, "--ranks", "1", "--restarts", "3", "resilience.spikes=rewind", "checkpoint.every=20")
    code, said = train(folder, "lost", *words, faults=lasting)
    assert code == 2 and "3 rewinds did not help; lower optimizer.lr" in said.splitlines()[-1]


def test_a_last_step_that_is_left_out_is_saved_all_the_same(folder: Path) -> None:
    last = ({"kind": "lasting", "rank": 0, "sample": 159, "times": float("nan")},)
    words = (*ALONE, "--ranks", "1", "--restarts", "0", "checkpoint.every=0")
    code, said = train(folder, "last", *words, faults=last)
    assert code == 0, said
    (saved,) = checkpoint.complete(folder / "runs/last/checkpoints")
    assert saved.name == "step-00000040"
